//! Accepts clients and hands each to the least loaded worker.

use crate::process::Memory;
use crate::settings::{Config, Settings};
use crate::shared::Shared;
use crate::upstream::link::Connector;
use crate::upstream::masters::Masters;
use crate::worker::{NewSocket, Worker, WorkerParts};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use vasto_proto::error;
use vasto_proto::net::LARGE_VALUES_IN_FLIGHT;
use vasto_proto::topology::Snapshot;

/// Sockets that wait for a worker; when it is full the acceptor waits and the kernel's backlog fills.
const SOCKETS_WAITING_MAX: usize = 1024;
/// Connections that the kernel may hold for us.
const BACKLOG: u32 = 4096;
/// Pause after an accept that failed, as when no file descriptors are left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// The gateway before it has its addresses.
#[derive(Debug)]
pub struct Gateway;

/// A gateway that listens and does not serve yet.
pub struct Bound {
    config: Config,
    connector: Arc<dyn Connector>,
    topology: watch::Receiver<Arc<Snapshot>>,
    listeners: Vec<TcpListener>,
    unix: Option<(UnixListener, PathBuf)>,
}

impl Gateway {
    /// Opens the sockets of `config`; errors name the address.
    pub async fn bind(
        config: Config,
        connector: Arc<dyn Connector>,
        topology: watch::Receiver<Arc<Snapshot>>,
    ) -> io::Result<Bound> {
        let mut listeners = Vec::new();
        for address in &config.listen {
            let listener = bind_tcp(*address)
                .map_err(|error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}")))?;
            listeners.push(listener);
        }
        let unix = match &config.unixsocket {
            Some(path) => {
                // A socket file that a killed process left behind is in the way; anything else there is not ours to remove.
                let is_socket = std::fs::symlink_metadata(path).is_ok_and(|metadata| {
                    use std::os::unix::fs::FileTypeExt;
                    metadata.file_type().is_socket()
                });
                if is_socket {
                    std::fs::remove_file(path)?;
                }
                let listener = UnixListener::bind(path).map_err(|error| {
                    io::Error::new(error.kind(), format!("cannot listen on {}: {error}", path.display()))
                })?;
                Some((listener, path.clone()))
            }
            None => None,
        };
        Ok(Bound { config, connector, topology, listeners, unix })
    }
}

fn bind_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { tokio::net::TcpSocket::new_v4()? } else { tokio::net::TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

struct WorkerHandle {
    sockets: mpsc::Sender<NewSocket>,
    load: Arc<AtomicUsize>,
    thread: JoinHandle<()>,
}

impl Bound {
    /// The addresses with their real ports.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.listeners.iter().filter_map(|listener| listener.local_addr().ok()).collect()
    }

    /// Serves until `shutdown` is cancelled, by the caller or by a client's SHUTDOWN; then drains.
    pub async fn run(self, shutdown: CancellationToken) {
        let shared = Arc::new(Shared {
            settings: Settings::new(&self.config),
            clients: Default::default(),
            slowlog: Default::default(),
            statistics: Default::default(),
            masters: Masters::new(self.config.masters.clone(), self.topology.clone()),
            started: Instant::now(),
            started_at: SystemTime::now(),
            started_with: Memory::read(),
            run_id: format!("{:016x}{:016x}{:08x}", fastrand::u64(..), fastrand::u64(..), fastrand::u32(..)),
            shutdown: shutdown.clone(),
        });
        if let Some(address) = self.addresses().first() {
            shared.settings.set_bound_port(address.port());
        }
        let large_permits = Arc::new(Semaphore::new(LARGE_VALUES_IN_FLIGHT));
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let count = if self.config.workers == 0 { cores } else { self.config.workers };
        let workers: Vec<WorkerHandle> = (0..count)
            .map(|number| {
                let (sockets, incoming) = mpsc::channel(SOCKETS_WAITING_MAX);
                let load = Arc::new(AtomicUsize::new(0));
                let parts = WorkerParts {
                    shared: Arc::clone(&shared),
                    connector: Arc::clone(&self.connector),
                    topology: self.topology.clone(),
                    sockets: incoming,
                    load: Arc::clone(&load),
                    large_permits: Arc::clone(&large_permits),
                    shutdown: shutdown.clone(),
                };
                let thread =
                    std::thread::Builder::new().name(format!("gateway-{number}")).spawn(move || Worker::run(parts));
                WorkerHandle { sockets, load, thread: thread.expect("a process may start a thread per core") }
            })
            .collect();
        let acceptor = Acceptor { shared: Arc::clone(&shared), workers: &workers };
        let publish = crate::metrics::run(&shared, shutdown.clone());
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = acceptor.accept_all(&self.listeners, self.unix.as_ref()) => {}
            () = publish => {}
        }
        shutdown.cancel();
        if let Some((_, path)) = &self.unix {
            let _ = std::fs::remove_file(path);
        }
        let threads: Vec<JoinHandle<()>> = workers.into_iter().map(|worker| worker.thread).collect();
        let joined =
            tokio::task::spawn_blocking(move || threads.into_iter().filter_map(|thread| thread.join().err()).count());
        if joined.await.is_ok_and(|panicked| panicked > 0) {
            tracing::error!("a gateway worker panicked");
        }
    }
}

struct Acceptor<'a> {
    shared: Arc<Shared>,
    workers: &'a [WorkerHandle],
}

impl Acceptor<'_> {
    async fn accept_all(&self, listeners: &[TcpListener], unix: Option<&(UnixListener, PathBuf)>) {
        let tcp = futures_util::future::join_all(listeners.iter().map(|listener| self.accept_tcp(listener)));
        match unix {
            Some((listener, path)) => {
                let path = path.display().to_string();
                tokio::join!(tcp, self.accept_unix(listener, &path));
            }
            None if listeners.is_empty() => std::future::pending().await,
            None => {
                tcp.await;
            }
        }
    }

    async fn accept_tcp(&self, listener: &TcpListener) {
        loop {
            match listener.accept().await {
                Ok((socket, peer)) => {
                    let local = socket.local_addr().map_or_else(|_| String::new(), |address| address.to_string());
                    let keepalive = self.shared.settings.tcp_keepalive();
                    let _ = socket.set_nodelay(true);
                    if let Some(keepalive) = keepalive {
                        let options = socket2::TcpKeepalive::new().with_time(keepalive);
                        let _ = socket2::SockRef::from(&socket).set_tcp_keepalive(&options);
                    }
                    if let Ok(socket) = socket.into_std() {
                        self.hand_over(NewSocket::Tcp { socket, peer: peer.to_string(), local }).await;
                    }
                }
                Err(error) => self.accept_failed(&error).await,
            }
        }
    }

    async fn accept_unix(&self, listener: &UnixListener, path: &str) {
        loop {
            match listener.accept().await {
                Ok((socket, _)) => {
                    if let Ok(socket) = socket.into_std() {
                        self.hand_over(NewSocket::Unix { socket, path: path.to_owned() }).await;
                    }
                }
                Err(error) => self.accept_failed(&error).await,
            }
        }
    }

    async fn accept_failed(&self, error: &io::Error) {
        warn!(%error, "accept failed");
        tokio::time::sleep(ACCEPT_PAUSE).await;
    }

    async fn hand_over(&self, socket: NewSocket) {
        self.shared.statistics.connection_received();
        let loads: usize = self.workers.iter().map(|worker| worker.load.load(Ordering::Relaxed)).sum();
        if loads >= self.shared.settings.maxclients() {
            self.shared.statistics.connection_rejected();
            let reply = format!("-{}\r\n", error::MAX_CLIENTS.text());
            // The socket does not block: a fresh one takes these few bytes, or the client is told nothing.
            let _ = match &socket {
                NewSocket::Tcp { socket, .. } => (&mut &*socket).write_all(reply.as_bytes()),
                NewSocket::Unix { socket, .. } => (&mut &*socket).write_all(reply.as_bytes()),
            };
            return;
        }
        let least = self.workers.iter().min_by_key(|worker| worker.load.load(Ordering::Relaxed));
        if let Some(worker) = least {
            worker.load.fetch_add(1, Ordering::Relaxed);
            let _ = worker.sockets.send(socket).await;
        }
    }
}
