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
//! - One call of `read` reads the socket once, whatever comes of it: how often is up to whoever calls. A peer that says more
//!   and more of which nothing is for the session is cut off.
//! - Nothing is closed behind the session's back: `finish` says that this side has said all, and `cut_off`
//!   ends it.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::{ServerConfig, ServerConnection};

use super::security::ALPN;
use super::transport::Received;

/// No more than this is encrypted ahead of what the socket takes: one record.
pub(crate) const ENCRYPTED_BYTES_MAX: usize = 16 << 10;

/// The longest record that TLS allows (16 KiB and what it is wrapped in), which is for nobody before it is whole, and a few
/// records in front of it that are for TLS itself.
const QUIET_BYTES_MAX: usize = 20 << 10;
/// A handshake takes a few KiB, and more with a long chain of certificates.
const HANDSHAKE_BYTES_MAX: usize = 64 << 10;

/// A connection of a [`Server`](super::Server). It goes from thread to thread with its session.
#[derive(Debug)]
pub(crate) enum Wire {
    /// TCP, readable by everybody on the way.
    Plain(PlainWire),
    /// TLS 1.3 on TCP, from its handshake on.
    Tls(Box<TlsWire>),
}

#[derive(Debug)]
pub(crate) struct PlainWire {
    stream: TcpStream,
}

impl Wire {
    /// Small frames leave at once, and nothing blocks.
    pub(crate) fn plain(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        Ok(Self::Plain(PlainWire { stream }))
    }

    /// The same within TLS, of which this is the server's end.
    pub(crate) fn tls(stream: TcpStream, config: Arc<ServerConfig>) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let mut connection = ServerConnection::new(config).map_err(io::Error::other)?;
        connection.set_buffer_limit(Some(ENCRYPTED_BYTES_MAX));
        Ok(Self::Tls(Box::new(TlsWire {
            stream,
            connection,
            quiet_bytes: 0,
            told: false,
            broken: false,
        })))
    }

    /// Once: what the peer has shown, when it has come through the handshake of TLS.
    pub(crate) fn newly_encrypted(&mut self) -> Option<Vec<CertificateDer<'static>>> {
        match self {
            Self::Plain(_) => None,
            Self::Tls(tls) => tls.newly_encrypted(),
        }
    }

    /// Whether TLS didn't come about, or broke.
    pub(crate) fn is_broken(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(tls) => tls.broken,
        }
    }

    /// To be registered for both directions.
    pub(crate) fn socket(&self) -> RawFd {
        match self {
            Self::Plain(plain) => plain.stream.as_raw_fd(),
            Self::Tls(tls) => tls.stream.as_raw_fd(),
        }
    }

    /// What has arrived, which may be no byte for the session yet; [`Received::Nothing`] until the next edge.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> Received {
        match self {
            Self::Plain(plain) => plain.read(buffer),
            Self::Tls(tls) => tls.read(buffer),
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
            Self::Tls(tls) => tls.write(bytes),
        }
    }

    /// Hands on to the socket what the wire itself holds; false if some of it is left until the next edge.
    ///
    /// # Errors
    /// The connection is broken.
    pub(crate) fn flush(&mut self) -> io::Result<bool> {
        match self {
            Self::Plain(_) => Ok(true),
            Self::Tls(tls) => tls.flush(),
        }
    }

    /// Nothing more will be written. What was written still arrives.
    pub(crate) fn finish(&mut self) {
        match self {
            Self::Plain(plain) => drop(plain.stream.shutdown(Shutdown::Write)),
            Self::Tls(tls) => tls.finish(),
        }
    }
}

impl PlainWire {
    fn read(&mut self, buffer: &mut [u8]) -> Received {
        loop {
            return match self.stream.read(buffer) {
                Ok(0) => Received::Closed,
                Ok(len) => Received::Bytes(len),
                Err(error) if error.kind() == ErrorKind::WouldBlock => Received::Nothing,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => Received::Closed,
            };
        }
    }
}

pub(crate) struct TlsWire {
    stream: TcpStream,
    connection: ServerConnection,
    /// How many bytes have come since the last one for the session, or since the handshake.
    quiet_bytes: usize,
    /// That the handshake is over was told.
    told: bool,
    /// What came isn't TLS as it was agreed upon.
    broken: bool,
}

impl std::fmt::Debug for TlsWire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsWire").field("stream", &self.stream).finish_non_exhaustive()
    }
}

impl TlsWire {
    fn newly_encrypted(&mut self) -> Option<Vec<CertificateDer<'static>>> {
        if self.told || self.broken || self.connection.is_handshaking() {
            return None;
        }
        self.told = true;
        Some(self.connection.peer_certificates().unwrap_or_default().to_vec())
    }

    /// TLS itself doesn't limit what a peer says without a byte for the session: what has told one kind of record from too
    /// many is forgotten with the next one of another kind.
    fn read(&mut self, buffer: &mut [u8]) -> Received {
        if self.broken {
            return Received::Closed;
        }
        match self.connection.reader().read(buffer) {
            Ok(0) => return Received::Closed,
            Ok(len) => return Received::Bytes(len),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return Received::Closed,
        }
        let was_handshaking = self.connection.is_handshaking();
        match self.connection.read_tls(&mut self.stream) {
            // The reader above tells whether that was in good order.
            Ok(0) if was_handshaking => return Received::Closed,
            Ok(len) => self.quiet_bytes += len,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Received::Nothing,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return Received::Closed,
        }
        let understood = self.connection.process_new_packets();
        let is_handshaking = self.connection.is_handshaking();
        let agreed = is_handshaking || self.connection.alpn_protocol() == Some(ALPN);
        // Also when it is broken: the last record says why.
        let written = self.flush().is_ok();
        let is_quiet = understood.as_ref().is_ok_and(|it| it.plaintext_bytes_to_read() == 0);
        if !is_quiet || (was_handshaking && !is_handshaking) {
            self.quiet_bytes = 0;
        }
        let limit = if is_handshaking { HANDSHAKE_BYTES_MAX } else { QUIET_BYTES_MAX };
        let is_endless = self.quiet_bytes > limit;
        self.broken = understood.is_err() || !agreed || !written || is_endless;
        Received::Bytes(0)
    }

    /// During the handshake a few bytes are taken and kept: they are sent when it is over.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.flush()? {
            return Ok(0);
        }
        let some = bytes.get(..ENCRYPTED_BYTES_MAX).unwrap_or(bytes);
        let taken = self.connection.writer().write(some)?;
        self.flush()?;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<bool> {
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut self.stream) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn finish(&mut self) {
        self.connection.send_close_notify();
        drop(self.flush());
        drop(self.stream.shutdown(Shutdown::Write));
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
