//! Bare senders that can't, or don't, use `sendfile`, or read what they send all the same.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::FileExt;

use super::tls;
use crate::wire::Sender;

/// How much is read at once.
const READ_BYTES: usize = 256 << 10;

/// Plain TCP.
pub(super) struct Copied(pub(super) TcpStream);

impl Sender for Copied {
    fn send(&mut self, file: io::Take<File>) -> io::Result<()> {
        read_and_write(file, &mut self.0)
    }

    fn end(&mut self) -> io::Result<()> {
        self.0.shutdown(Shutdown::Write)
    }
}

/// Plain TCP; nothing leaves that wasn't read and checksummed before.
pub(super) struct Checked {
    pub(super) stream: TcpStream,
    /// What was read is sent by `sendfile`, and not from where it was read to.
    pub(super) by_sendfile: bool,
}

impl Sender for Checked {
    fn send(&mut self, file: io::Take<File>) -> io::Result<()> {
        let (end, file) = (file.limit(), file.into_inner());
        let (mut buffer, mut at) = (vec![0; READ_BYTES], 0);
        while at < end {
            let len = usize::try_from(end - at).map_or(READ_BYTES, |left| left.min(READ_BYTES));
            let bytes = buffer.get_mut(..len).unwrap_or_default();
            file.read_exact_at(bytes, at)?;
            std::hint::black_box(crc32fast::hash(bytes));
            let behind = at + len as u64;
            if !self.by_sendfile {
                self.stream.write_all(bytes)?;
                at = behind;
            }
            while at < behind {
                let left = usize::try_from(behind - at).unwrap_or(READ_BYTES);
                if rustix::fs::sendfile(&self.stream, &file, Some(&mut at), left)? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
        }
        Ok(())
    }

    fn end(&mut self) -> io::Result<()> {
        self.stream.shutdown(Shutdown::Write)
    }
}

impl Sender for tls::Client {
    fn send(&mut self, file: io::Take<File>) -> io::Result<()> {
        read_and_write(file, self)
    }

    fn end(&mut self) -> io::Result<()> {
        self.conn.send_close_notify();
        self.flush()
    }
}

fn read_and_write(mut file: impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(());
        }
        to.write_all(buffer.get(..read).unwrap_or_default())?;
    }
}
