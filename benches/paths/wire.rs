//! What the machine does without Headwater, over the loopback.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use crate::Outcome;
use crate::baseline::Device;
use crate::meter::{Meter, Took};

/// How much a bare receiver writes before it syncs.
const SYNC_BYTES: usize = 8 << 20;

/// One who sends files.
pub(crate) trait Sender {
    fn send(&mut self, file: io::Take<File>) -> io::Result<()>;

    /// There is no more.
    fn end(&mut self) -> io::Result<()>;
}

impl Sender for TcpStream {
    /// By `sendfile` itself: `io::copy` from a file to a socket reads and writes, 8 KiB at a time.
    fn send(&mut self, file: io::Take<File>) -> io::Result<()> {
        let (mut left, file) = (file.limit(), file.into_inner());
        while left > 0 {
            let count = usize::try_from(left).unwrap_or(usize::MAX);
            match rustix::fs::sendfile(&*self, &file, None, count)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                sent => left -= sent as u64,
            }
        }
        Ok(())
    }

    fn end(&mut self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

/// Sends the first bytes of each file over the loopback; the other side checks, writes and syncs them.
pub(crate) fn send_and_sync(files: &[(PathBuf, u64)], sink: &Path) -> Outcome<Took> {
    send_and_sync_over(files, sink, Ok, Ok)
}

/// The same, with what is put over both ends of the connection.
pub(crate) fn send_and_sync_over<S: Sender, R: Read>(
    files: &[(PathBuf, u64)],
    sink: &Path,
    sender: impl FnOnce(TcpStream) -> Outcome<S>,
    receiver: impl FnOnce(TcpStream) -> Outcome<R> + Send,
) -> Outcome<Took> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let meter = Meter::start();
    let received = std::thread::scope(|scope| {
        let receiving = scope.spawn(|| -> Outcome<u64> {
            let mut stream = receiver(listener.accept()?.0)?;
            Ok(receive(&mut stream, &mut File::create_new(sink)?)?)
        });
        let mut stream = sender(TcpStream::connect(address)?)?;
        for (path, len) in files {
            stream.send(File::open(path)?.take(*len))?;
        }
        stream.end()?;
        receiving.join().map_err(|_| "the receiver panicked")?
    })?;
    let took = meter.stop();
    let sent: u64 = files.iter().map(|(_, len)| len).sum();
    if received == sent { Ok(took) } else { Err("bytes were lost on the way".into()) }
}

fn receive(stream: &mut impl Read, sink: &mut File) -> io::Result<u64> {
    let mut buffer = Vec::with_capacity(SYNC_BYTES);
    let mut total = 0;
    loop {
        buffer.clear();
        let read = stream.by_ref().take(SYNC_BYTES as u64).read_to_end(&mut buffer)?;
        if read == 0 {
            return Ok(total);
        }
        std::hint::black_box(crc32fast::hash(&buffer));
        sink.write_all(&buffer)?;
        sink.sync_data()?;
        total += read as u64;
    }
}

/// Somebody at the other end of a connection who makes durable what arrives, and says so.
pub(crate) struct Peer {
    stream: TcpStream,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Peer {
    /// Messages are of `len` bytes.
    pub(crate) fn start(mut device: Device, len: usize) -> Outcome<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let stream = TcpStream::connect(listener.local_addr()?)?;
        stream.set_nodelay(true)?;
        let mut accepted = listener.accept()?.0;
        accepted.set_nodelay(true)?;
        let thread = std::thread::spawn(move || {
            let mut message = vec![0; len];
            while accepted.read_exact(&mut message).is_ok() {
                device.write_synced(&message)?;
                accepted.write_all(&[1])?;
            }
            Ok(())
        });
        Ok(Self { stream, thread: Some(thread) })
    }

    /// Sends a message, and waits until it is durable there.
    pub(crate) fn send(&mut self, message: &[u8]) -> io::Result<()> {
        self.stream.write_all(message)?;
        self.stream.read_exact(&mut [0])
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.stream.shutdown(Shutdown::Both));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}
