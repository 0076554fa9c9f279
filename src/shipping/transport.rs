//! TCP and the clock, as thin as possible: everything that decides is in [`session`](super::session).

use std::io::{self, Read};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, bounded};

use super::error::ShippingError;
use super::session::Now;
use crate::env;

/// How long a read waits before the session is asked about its deadlines, and how soon a thread notices
/// that it shall stop.
pub(crate) const TICK: Duration = Duration::from_millis(200);
/// How long the name service may take.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);

pub(crate) fn now() -> Now {
    Now { at: Instant::now(), unix_us: env::now_us() }
}

/// Whether plain TCP to or from this address stays on this machine.
pub(crate) fn is_loopback(address: &SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}

/// Small frames leave at once, a stalled write ends, and reads wake up to look at deadlines.
pub(crate) fn prepare(stream: &TcpStream, write_stall: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(TICK))?;
    stream.set_write_timeout(Some(write_stall))
}

/// What a read brought.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// So many bytes.
    Bytes(usize),
    /// Nothing within a [`TICK`].
    Nothing,
    /// The other side has closed, or the connection is broken.
    Closed,
}

pub(crate) fn receive(mut stream: &TcpStream, buffer: &mut [u8]) -> Received {
    match stream.read(buffer) {
        Ok(0) => Received::Closed,
        Ok(len) => Received::Bytes(len),
        Err(error) => match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted => {
                Received::Nothing
            }
            _ => Received::Closed,
        },
    }
}

/// All addresses that `address` stands for now. A name is looked up anew each time, on a thread of its own:
/// the system's resolver can't be interrupted, and is left behind when it takes too long.
pub(crate) fn resolve(
    address: &str,
    give_up: impl Fn() -> bool,
) -> Result<Vec<SocketAddr>, ShippingError> {
    if let Ok(address) = address.parse() {
        return Ok(vec![address]);
    }
    let failed = |source: io::Error| ShippingError::Resolve {
        address: address.to_owned(),
        source: Arc::new(source),
    };
    let (answer, answered) = bounded(1);
    let name = address.to_owned();
    let lookup = move || {
        let found = name.to_socket_addrs().map(Iterator::collect::<Vec<_>>);
        drop(answer.send(found));
    };
    thread::Builder::new().name("headwater-resolve".into()).spawn(lookup).map_err(failed)?;
    let deadline = Instant::now() + RESOLVE_TIMEOUT;
    loop {
        match answered.recv_timeout(TICK) {
            Ok(Ok(found)) if found.is_empty() => {
                return Err(failed(io::ErrorKind::NotFound.into()));
            }
            Ok(found) => return found.map_err(failed),
            Err(RecvTimeoutError::Timeout) if !give_up() && Instant::now() < deadline => {}
            Err(_) => return Err(failed(io::ErrorKind::TimedOut.into())),
        }
    }
}

/// Connects to the first of the addresses that answers.
pub(crate) fn connect(
    addresses: &[SocketAddr],
    timeout: Duration,
    give_up: impl Fn() -> bool,
) -> Result<TcpStream, ShippingError> {
    let mut last = ShippingError::Disconnected;
    for address in addresses {
        if give_up() {
            break;
        }
        match TcpStream::connect_timeout(address, timeout) {
            Ok(stream) => return Ok(stream),
            Err(source) => {
                last = ShippingError::Connect { address: *address, source: Arc::new(source) };
            }
        }
    }
    Err(last)
}
