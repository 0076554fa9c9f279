//! A mirror's connection to its origin, plain or TLS, shared by the thread that reads and those that write.
//!
//! Invariants:
//! - Whoever waits for bytes holds no lock, so writing never waits for reading.
//! - What is written goes out in the order in which it was encrypted: both happen under one lock of writers.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use parking_lot::Mutex;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection};

use super::error::ShippingError;
use super::security::{ALPN, TlsFailure};
use super::transport::{self, Received};

/// The longest record of TLS.
const RECORD_BYTES: usize = 16 << 10;
/// How a TLS server answers what isn't TLS. No frame begins like this: it would be longer than any first frame.
const TLS_ALERT: [u8; 2] = [0x15, 0x03];

/// What reading brought.
pub(crate) enum Arrived<'a> {
    Bytes(&'a [u8]),
    /// Nothing that says anything yet.
    Nothing,
    /// The other side has closed, or the connection is broken.
    Closed,
}

pub(crate) struct Link {
    stream: TcpStream,
    tls: Option<Mutex<ClientConnection>>,
    /// What goes out. Held while writing, so that frames and records stay whole and in order.
    writing: Mutex<Vec<u8>>,
    heard: AtomicBool,
    failure: Mutex<Option<TlsFailure>>,
}

impl Link {
    pub(crate) fn plain(stream: TcpStream) -> Self {
        let (writing, failure) = (Mutex::default(), Mutex::default());
        Self { stream, tls: None, writing, heard: AtomicBool::new(false), failure }
    }

    /// The handshake goes on with what is written and read.
    pub(crate) fn tls(
        stream: TcpStream,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
    ) -> Result<Self, ShippingError> {
        let connection = ClientConnection::new(config, name)
            .map_err(|error| ShippingError::Tls(TlsFailure::new(error, true)))?;
        Ok(Self { tls: Some(Mutex::new(connection)), ..Self::plain(stream) })
    }

    /// Why TLS failed, if that is why it is closed.
    pub(crate) fn failure(&self) -> Option<TlsFailure> {
        self.failure.lock().clone()
    }

    pub(crate) fn cut_off(&self) {
        drop(self.stream.shutdown(Shutdown::Both));
    }

    /// Writes what `put` puts out, and what TLS has to say of its own; false if nobody takes it any more.
    /// Nothing leaves in clear, nor before the origin was recognised.
    pub(crate) fn write(&self, put: impl FnOnce(&mut Vec<u8>)) -> bool {
        let mut out = self.writing.lock();
        out.clear();
        put(&mut out);
        if let Some(connection) = &self.tls {
            let mut connection = connection.lock();
            // What waits for the end of the handshake must not go to whoever speaks something else.
            if is_led_astray(&connection) || encrypt(&mut connection, &mut out).is_err() {
                return false;
            }
        }
        out.is_empty() || (&self.stream).write_all(&out).is_ok()
    }

    /// Waits a [`TICK`](transport::TICK) for bytes. What has arrived lies in one of the two buffers.
    pub(crate) fn receive<'b>(&self, raw: &'b mut [u8], plain: &'b mut Vec<u8>) -> Arrived<'b> {
        let bytes = match transport::receive(&self.stream, raw) {
            Received::Bytes(len) => raw.get(..len).unwrap_or_default(),
            Received::Nothing => return Arrived::Nothing,
            Received::Closed => return Arrived::Closed,
        };
        let Some(connection) = &self.tls else {
            let first = !self.heard.swap(true, Ordering::Relaxed);
            if first && bytes.starts_with(&TLS_ALERT) {
                return self.failed(TlsFailure::PLAINTEXT);
            }
            return Arrived::Bytes(bytes);
        };
        plain.clear();
        let mut connection = connection.lock();
        let handshaking = connection.is_handshaking();
        match decrypt(&mut connection, bytes, plain) {
            Ok(true) if plain.is_empty() => Arrived::Closed,
            Ok(_) if plain.is_empty() => Arrived::Nothing,
            Ok(_) => Arrived::Bytes(plain),
            Err(Some(error)) => self.failed(TlsFailure::new(error, handshaking)),
            Err(None) => self.failed(TlsFailure::NO_PROTOCOL),
        }
    }

    fn failed(&self, failure: TlsFailure) -> Arrived<'static> {
        *self.failure.lock() = Some(failure);
        Arrived::Closed
    }
}

/// A thread that panics takes the connection with it: another one alone would listen and never write.
pub(crate) struct CutOff<'a>(pub(crate) &'a Link);

impl Drop for CutOff<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.cut_off();
        }
    }
}

/// Whether whoever has answered doesn't speak our protocol.
fn is_led_astray(connection: &ClientConnection) -> bool {
    !connection.is_handshaking() && connection.alpn_protocol() != Some(ALPN)
}

/// Replaces what is to be said by the records that say it; before the end of the handshake, it is kept until then.
fn encrypt(connection: &mut ClientConnection, out: &mut Vec<u8>) -> io::Result<()> {
    let said = std::mem::take(out);
    let mut parts = said.chunks(RECORD_BYTES);
    loop {
        while connection.wants_write() {
            connection.write_tls(out)?;
        }
        let Some(part) = parts.next() else { return Ok(()) };
        connection.writer().write_all(part)?;
    }
}

/// Appends to `plain` what the records in `bytes` say; true if they say that nothing follows. `Err(None)`: the
/// origin hasn't agreed upon what is spoken.
fn decrypt(
    connection: &mut ClientConnection,
    mut bytes: &[u8],
    plain: &mut Vec<u8>,
) -> Result<bool, Option<rustls::Error>> {
    while !bytes.is_empty() {
        // Always has room: what there was is taken out below.
        connection.read_tls(&mut bytes).map_err(|_| None)?;
        let state = connection.process_new_packets().map_err(Some)?;
        if is_led_astray(connection) {
            return Err(None);
        }
        let at = plain.len();
        plain.resize(at + state.plaintext_bytes_to_read(), 0);
        let taken = connection.reader().read_exact(plain.get_mut(at..).unwrap_or_default());
        taken.map_err(|_| None)?;
        if state.peer_has_closed() {
            return Ok(true);
        }
    }
    Ok(false)
}
