//! A blocking RESP connection that sees the raw bytes; over TCP or a Unix socket.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::resp::{self, ReplyScanner, Value};

/// A reply that takes longer on a busy machine is a hang.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(60);

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(address) => address.fmt(formatter),
            Address::Unix(path) => path.display().fmt(formatter),
        }
    }
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// One client.
pub struct Connection {
    stream: Stream,
    address: Address,
    /// What came and belongs to no reply yet.
    received: Vec<u8>,
    reply_timeout: Duration,
}

impl Connection {
    /// Connects; panics when nobody listens.
    pub fn open(address: &Address) -> Connection {
        Connection::try_open(address).unwrap_or_else(|error| panic!("no connection to {address}: {error}"))
    }

    pub fn try_open(address: &Address) -> io::Result<Connection> {
        let stream = match address {
            Address::Tcp(address) => {
                let stream = TcpStream::connect_timeout(address, Duration::from_secs(10))?;
                stream.set_nodelay(true)?;
                Stream::Tcp(stream)
            }
            Address::Unix(path) => Stream::Unix(UnixStream::connect(path)?),
        };
        let mut connection =
            Connection { stream, address: address.clone(), received: Vec::new(), reply_timeout: REPLY_TIMEOUT };
        connection.set_reply_timeout(REPLY_TIMEOUT)?;
        Ok(connection)
    }

    pub fn set_reply_timeout(&mut self, timeout: Duration) -> io::Result<()> {
        self.reply_timeout = timeout;
        match &self.stream {
            Stream::Tcp(stream) => {
                stream.set_read_timeout(Some(timeout))?;
                stream.set_write_timeout(Some(timeout))
            }
            Stream::Unix(stream) => {
                stream.set_read_timeout(Some(timeout))?;
                stream.set_write_timeout(Some(timeout))
            }
        }
    }

    /// Reads and writes return at once with `WouldBlock`, for tests of clients that do not read.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        match &self.stream {
            Stream::Tcp(stream) => stream.set_nonblocking(nonblocking),
            Stream::Unix(stream) => stream.set_nonblocking(nonblocking),
        }
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.stream {
            Stream::Tcp(stream) => stream.write_all(bytes),
            Stream::Unix(stream) => stream.write_all(bytes),
        }
    }

    /// Sends what goes without waiting and says how much it was.
    pub fn send_some(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.stream {
            Stream::Tcp(stream) => stream.write(bytes),
            Stream::Unix(stream) => stream.write(bytes),
        }
    }

    /// Says that nothing more will be sent.
    pub fn finish_sending(&self) -> io::Result<()> {
        match &self.stream {
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Stream::Unix(stream) => stream.shutdown(Shutdown::Write),
        }
    }

    fn receive_some(&mut self, at_most: usize) -> io::Result<usize> {
        let start = self.received.len();
        self.received.resize(start + at_most, 0);
        let result = match &mut self.stream {
            Stream::Tcp(stream) => stream.read(&mut self.received[start..]),
            Stream::Unix(stream) => stream.read(&mut self.received[start..]),
        };
        self.received.truncate(start + *result.as_ref().unwrap_or(&0));
        result
    }

    /// The exact bytes of the next reply.
    pub fn read_raw(&mut self) -> io::Result<Vec<u8>> {
        let mut scanner = ReplyScanner::default();
        let mut step = 16 * 1024;
        loop {
            if let Some(length) = scanner.scan(&self.received)? {
                let rest = self.received.split_off(length);
                return Ok(std::mem::replace(&mut self.received, rest));
            }
            match self.receive_some(step) {
                Ok(0) => {
                    let received = self.received.escape_ascii().to_string();
                    let shown: String = received.chars().take(200).collect();
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        format!("closed by {} after a part of a reply: '{shown}'", self.address),
                    ));
                }
                // Large values arrive in large steps.
                Ok(_) => step = (step * 2).min(4 * 1024 * 1024),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    pub fn read_value(&mut self) -> io::Result<Value> {
        resp::parse(&self.read_raw()?)
    }

    pub fn try_call<A: AsRef<[u8]>>(&mut self, arguments: &[A]) -> io::Result<Value> {
        self.send(&resp::command(arguments))?;
        self.read_value()
    }

    /// One command, one reply; panics when the connection breaks.
    pub fn call<A: AsRef<[u8]>>(&mut self, arguments: &[A]) -> Value {
        match self.try_call(arguments) {
            Ok(value) => value,
            Err(error) => panic!("{} to {}: {error}", shown(arguments), self.address),
        }
    }

    /// One command that must not answer an error.
    pub fn done<A: AsRef<[u8]>>(&mut self, arguments: &[A]) -> Value {
        let value = self.call(arguments);
        assert!(!value.is_error(), "{} to {}: {}", shown(arguments), self.address, value.text());
        value
    }

    /// Several commands in one packet, their replies in order. The caller keeps the commands small
    /// enough for the sockets' buffers, since nothing is read before all is sent.
    pub fn pipeline<A: AsRef<[u8]>>(&mut self, commands: &[Vec<A>]) -> io::Result<Vec<Value>> {
        let mut bytes = Vec::new();
        for command in commands {
            bytes.extend_from_slice(&resp::command(command));
        }
        self.send(&bytes)?;
        commands.iter().map(|_| self.read_value()).collect()
    }

    /// Everything that comes until the server closes, or until nothing has come for `quiet`; and whether it was closed.
    pub fn read_until_quiet(&mut self, quiet: Duration) -> (Vec<u8>, bool) {
        let before = self.reply_timeout;
        // A socket refuses a timeout of zero; no caller gives one.
        if self.set_reply_timeout(quiet).is_err() {
            return (std::mem::take(&mut self.received), true);
        }
        let closed = loop {
            match self.receive_some(64 * 1024) {
                Ok(0) => break true,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    break false;
                }
                // Closed while bytes of ours were still unread on the other side.
                Err(_) => break true,
            }
        };
        let _ = self.set_reply_timeout(before);
        (std::mem::take(&mut self.received), closed)
    }

    /// Whether the server has closed the connection within `patience`; what comes meanwhile is dropped.
    pub fn is_closed_within(&mut self, patience: Duration) -> bool {
        let start = Instant::now();
        while start.elapsed() < patience {
            let (_, closed) = self.read_until_quiet(Duration::from_millis(50));
            if closed {
                return true;
            }
        }
        false
    }
}

/// A command as a person would type it, long arguments cut.
pub fn shown<A: AsRef<[u8]>>(arguments: &[A]) -> String {
    let words: Vec<String> = arguments
        .iter()
        .map(|argument| {
            let argument = argument.as_ref();
            let quoted = crate::notation::quote_if_needed(&argument[..argument.len().min(80)]);
            if argument.len() > 80 { format!("{quoted}...({} bytes)", argument.len()) } else { quoted }
        })
        .collect();
    words.join(" ")
}
