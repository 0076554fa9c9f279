//! Bare senders that can't, or don't, use `sendfile`.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};

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
