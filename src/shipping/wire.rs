//! One end of a connection that never blocks: plain TCP, and whatever looks the same from outside.
//!
//! ```text
//!   session ── bytes ──▶ write ─▶ ┌──────┐ ─▶ socket       the socket is registered for both directions, by edge:
//!   session ◀─ bytes ─── read  ◀─ │ Wire │ ◀─ socket       whoever is told that something happened reads until
//!                        flush ─▶ └──────┘                 it is drained, and flushes and writes until 0
//! ```
//! - `read` and `write` speak of the session's bytes. What a wire needs for itself (a handshake, records that
//!   the socket hasn't taken) it reads and writes on the way, and holds: `flush` gets on with it.
//! - What it holds is bounded by one record and one handshake message; then `write` takes nothing.
//! - Nothing is closed behind the session's back: `finish` says that this side has said all, and `cut_off`
//!   ends it.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd as _, RawFd};

use super::transport::Received;

/// A connection of a [`Server`](super::Server). It goes from thread to thread with its session.
#[derive(Debug)]
pub(crate) enum Wire {
    /// TCP, readable by everybody on the way.
    Plain(PlainWire),
}

#[derive(Debug)]
pub(crate) struct PlainWire {
    stream: TcpStream,
    /// The last read got less than there was room for.
    is_drained: bool,
}

impl Wire {
    /// Small frames leave at once, and nothing blocks.
    pub(crate) fn plain(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        Ok(Self::Plain(PlainWire { stream, is_drained: false }))
    }

    /// To be registered for both directions.
    pub(crate) fn socket(&self) -> RawFd {
        match self {
            Self::Plain(plain) => plain.stream.as_raw_fd(),
        }
    }

    /// What has arrived; [`Received::Nothing`] until the next edge.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> Received {
        match self {
            Self::Plain(plain) => plain.read(buffer),
        }
    }

    /// Whether it is known that nothing more has arrived: the next read would answer [`Received::Nothing`].
    pub(crate) const fn is_drained(&self) -> bool {
        match self {
            Self::Plain(plain) => plain.is_drained,
        }
    }

    /// Takes as many bytes as go; 0: no more until the next edge.
    ///
    /// # Errors
    /// The connection is broken.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        match self {
            Self::Plain(plain) => write_some(&mut plain.stream, bytes),
        }
    }

    /// Hands on to the socket what the wire itself holds; false if some of it is left until the next edge.
    ///
    /// # Errors
    /// The connection is broken.
    pub(crate) fn flush(&mut self) -> io::Result<bool> {
        match self {
            Self::Plain(_) => Ok(true),
        }
    }

    /// Nothing more will be written. What was written still arrives.
    pub(crate) fn finish(&mut self) {
        match self {
            Self::Plain(plain) => drop(plain.stream.shutdown(Shutdown::Write)),
        }
    }
}

impl PlainWire {
    fn read(&mut self, buffer: &mut [u8]) -> Received {
        loop {
            return match self.stream.read(buffer) {
                Ok(0) => Received::Closed,
                Ok(len) => {
                    self.is_drained = len < buffer.len();
                    Received::Bytes(len)
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => Received::Nothing,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => Received::Closed,
            };
        }
    }
}

/// Writes as much as goes; 0 when the socket takes nothing at present.
pub(crate) fn write_some(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<usize> {
    loop {
        return match stream.write(bytes) {
            Ok(0) => Err(ErrorKind::WriteZero.into()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            written => written,
        };
    }
}
