//! The machine alone: a message is written and synced, and then sent to one connection after the other.
//!
//! It says and takes the lines of an [`origin`], and those of [relays](super::relays). There is no protocol: whoever connects gets what is sent
//! from then on, and says nothing.

use std::io::{self, BufRead as _, Read as _, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use clap::Args;
use headwater::position::{Chain, Checkpoint, Incarnation, JournalId, Position};
use rustls::ServerConfig;

use super::origin::{self, Moment, hex, say};
use super::tls::{self, Identity};
use crate::Outcome;
use crate::baseline::Device;
use crate::timing::now_ns;

const FILE_BYTES: u64 = 8 << 20;

/// What stands in the table for all of it.
pub(super) const WHAT: &str = "write + fdatasync, then one socket after the other";

#[derive(Debug, Args)]
pub(crate) struct Task {
    dir: PathBuf,
    address: String,
    message_bytes: usize,
    tls: Option<PathBuf>,
}

pub(crate) fn serve(task: &Task) -> Outcome<()> {
    let tls = task.tls.as_deref().map(|dir| Identity::at(dir).bare_server()).transpose()?;
    let mut device = device(&task.dir)?;
    let fan = Fan::open(&task.address, tls)?;
    let message = vec![0xA5; task.message_bytes];
    let mut sent = 0;
    say(&format!("serving {} {}", fan.address, hex(&behind(sent, &message))))?;
    let commit = |_| {
        let called_ns = now_ns();
        device.write_synced(&message)?;
        let answered_ns = now_ns();
        fan.send(&message);
        sent += 1;
        Ok(Moment { end: behind(sent, &message), called_ns, answered_ns })
    };
    origin::obey(commit, || fan.len())
}

/// Each passes on what it gets, once it is synced.
pub(crate) fn relay(dir: &Path, origin: &str, count: usize, message_bytes: usize) -> Outcome<()> {
    let fans = (0..count)
        .map(|number| {
            let mut device = device(&dir.join(number.to_string()))?;
            let mut upstream = TcpStream::connect(origin)?;
            let fan = Arc::new(Fan::open("127.0.0.1:0", None)?);
            let passes_on = Arc::clone(&fan);
            std::thread::spawn(move || -> io::Result<()> {
                let mut message = vec![0; message_bytes];
                loop {
                    upstream.read_exact(&mut message)?;
                    device.write_synced(&message)?;
                    passes_on.send(&message);
                }
            });
            Ok(fan)
        })
        .collect::<Outcome<Vec<_>>>()?;
    let addresses: Vec<_> = fans.iter().map(|fan| fan.address.to_string()).collect();
    say(&format!("relaying {}", addresses.join(" ")))?;
    for line in io::stdin().lock().lines() {
        match line?.as_str() {
            "peers" => say(&format!("peers {}", fans.iter().map(|fan| fan.len()).sum::<usize>()))?,
            other => return Err(format!("what is {other:?}?").into()),
        }
    }
    Ok(())
}

/// The one that is there already, after a kill.
fn device(dir: &Path) -> Outcome<Device> {
    std::fs::create_dir_all(dir)?;
    let file = dir.join("device");
    Ok(if file.exists() { Device::open(&file)? } else { Device::create(&file, FILE_BYTES)? })
}

/// Where so many messages end.
fn behind(messages: u64, message: &[u8]) -> Checkpoint {
    Checkpoint {
        journal: JournalId::from_bytes([0; 16]),
        epoch: 0,
        incarnation: Incarnation::new(0),
        offset: messages * message.len() as u64,
        position: Position::new(messages),
        chain: Chain::default(),
    }
}

/// Everybody who is connected to an address.
struct Fan {
    address: SocketAddr,
    connections: Arc<Mutex<Vec<Connection>>>,
}

impl Fan {
    fn open(address: &str, tls: Option<Arc<ServerConfig>>) -> Outcome<Self> {
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        let connections = Arc::new(Mutex::new(Vec::new()));
        let accepted = Arc::clone(&connections);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let connection =
                    stream.map_err(Into::into).and_then(|it| Connection::accept(it, tls.as_ref()));
                let Ok(connection) = connection else { return }; // the count of connections tells
                accepted.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
            }
        });
        Ok(Self { address, connections })
    }

    /// Who doesn't take it is gone.
    fn send(&self, message: &[u8]) {
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        connections.retain_mut(|connection| connection.write_all(message).is_ok());
    }

    fn len(&self) -> usize {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

enum Connection {
    Plain(TcpStream),
    Tls(Box<tls::Server>),
}

impl Connection {
    fn accept(stream: TcpStream, tls: Option<&Arc<ServerConfig>>) -> Outcome<Self> {
        stream.set_nodelay(true)?;
        let Some(config) = tls else { return Ok(Self::Plain(stream)) };
        let mut stream = tls::accept(Arc::clone(config), stream)?;
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(Self::Tls(Box::new(stream)))
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.write_all(bytes),
            Self::Tls(stream) => stream.write_all(bytes).and_then(|()| stream.flush()),
        }
    }
}
