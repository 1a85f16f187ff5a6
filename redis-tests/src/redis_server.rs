//! Debian's redis-server as oracle: what it answers is what ours must answer.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::cluster::temporary_directory;
use crate::connection::{Address, Connection};
use crate::eventually::{PATIENCE, eventually_within};
use crate::resp::Value;

/// A redis-server without persistence on a Unix socket in a folder of its own.
pub struct RedisServer {
    child: Child,
    socket: PathBuf,
    directory: TempDir,
}

impl RedisServer {
    pub fn start() -> RedisServer {
        RedisServer::start_with(&[])
    }

    pub fn start_with(options: &[&str]) -> RedisServer {
        let directory = temporary_directory();
        let socket = directory.path().join("redis.sock");
        let child = Command::new("redis-server")
            .args(["--port", "0", "--save", "", "--appendonly", "no", "--loglevel", "warning"])
            // The servers that it is compared with get as many; tests of several databases say so.
            .args(["--databases", "1", "--enable-debug-command", "yes"])
            .arg("--unixsocket")
            .arg(&socket)
            .arg("--dir")
            .arg(directory.path())
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start redis-server, `make test` installs it: {error}"));
        let server = RedisServer { child, socket, directory };
        eventually_within(PATIENCE, "redis-server answers", || {
            let mut connection = Connection::try_open(&server.address())?;
            match connection.try_call(&["PING"])? {
                Value::Simple(pong) if pong == b"PONG" => Ok(()),
                other => Err(std::io::Error::other(other.text())),
            }
        });
        server
    }

    pub fn address(&self) -> Address {
        Address::Unix(self.socket.clone())
    }

    pub fn connect(&self) -> Connection {
        Connection::open(&self.address())
    }

    /// Where it writes its files.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        // It may have ended by itself, as SHUTDOWN lets it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
