//! One worker: a thread with its own single-threaded runtime, its connections, and its own link to each store.

use crate::connection::{Connection, READ_BYTES, Socket};
use crate::routing::Routing;
use crate::session::Session;
use crate::shared::Shared;
use crate::upstream::link::Connector;
use crate::upstream::pool::Link;
use slab::Slab;
use std::cell::{Cell, RefCell, RefMut};
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::task::LocalSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use vasto_proto::id::StoreId;
use vasto_proto::topology::Snapshot;

/// How often connections that wait for something without a sign (a topology, a pause, a store that comes back) are looked at.
const CHECK_INTERVAL: Duration = Duration::from_millis(20);
/// How often operations are looked for that a store does not answer.
const SWEEP_INTERVAL: Duration = Duration::from_millis(100);
/// Output buffers kept for the next reply, and the largest that is kept.
const SPARE_BUFFERS_MAX: usize = 64;
const SPARE_BUFFER_BYTES_MAX: usize = 64 << 10;
/// How long a stopping gateway waits for the answers that clients are owed.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// A socket on its way to its worker.
#[derive(Debug)]
pub enum NewSocket {
    Tcp { socket: std::net::TcpStream, peer: String, local: String },
    Unix { socket: std::os::unix::net::UnixStream, path: String },
}

/// What a worker is made of.
pub struct WorkerParts {
    pub shared: Arc<Shared>,
    pub connector: Arc<dyn Connector>,
    pub topology: watch::Receiver<Arc<Snapshot>>,
    pub sockets: mpsc::Receiver<NewSocket>,
    /// Connections of this worker, by which the acceptor chooses.
    pub load: Arc<AtomicUsize>,
    pub large_permits: Arc<Semaphore>,
    pub shutdown: CancellationToken,
}

/// State of one worker; everything in it stays on its thread.
pub struct Worker {
    shared: Arc<Shared>,
    connector: Arc<dyn Connector>,
    routing: RefCell<Rc<Routing>>,
    /// A handful: found faster by looking at each than by hashing.
    links: RefCell<Vec<(StoreId, Rc<Link>)>>,
    connections: RefCell<Slab<Rc<Connection>>>,
    read_buffer: RefCell<Vec<u8>>,
    spare_buffers: RefCell<Vec<Vec<u8>>>,
    to_check: RefCell<Vec<Rc<Connection>>>,
    check_wanted: Notify,
    /// When the topology was taken up by which this worker routes.
    adopted_at: Cell<Instant>,
    now: Cell<Instant>,
    now_ms: Cell<u64>,
    large_permits: Arc<Semaphore>,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Worker").field("connections", &self.connections.borrow().len()).finish_non_exhaustive()
    }
}

impl Worker {
    /// Runs a worker on the calling thread until `shutdown`, then drains.
    pub fn run(parts: WorkerParts) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime needs only file descriptors and memory");
        LocalSet::new().block_on(&runtime, Self::serve(parts));
    }

    async fn serve(parts: WorkerParts) {
        let WorkerParts { shared, connector, mut topology, mut sockets, load, large_permits, shutdown } = parts;
        let routing = Rc::new(Routing::new(topology.borrow_and_update().clone()));
        let worker = Rc::new(Self {
            shared,
            connector,
            routing: RefCell::new(routing),
            links: RefCell::default(),
            connections: RefCell::default(),
            read_buffer: RefCell::new(vec![0; READ_BYTES]),
            spare_buffers: RefCell::default(),
            to_check: RefCell::default(),
            check_wanted: Notify::new(),
            adopted_at: Cell::new(Instant::now()),
            now: Cell::new(Instant::now()),
            now_ms: Cell::new(crate::clients::unix_ms()),
            large_permits,
        });
        let checks = worker.run_checks();
        let ticks = worker.run_ticks();
        let sweeps = worker.run_sweeps();
        let accept = async {
            loop {
                tokio::select! {
                    () = shutdown.cancelled() => break,
                    socket = sockets.recv() => match socket {
                        Some(socket) => worker.accept(socket, &load),
                        None => break,
                    },
                    changed = topology.changed() => match changed {
                        Ok(()) => worker.adopt(topology.borrow_and_update().clone()),
                        Err(_) => break,
                    },
                }
            }
            worker.drain().await;
        };
        // The loops end with the acceptor, whatever they are doing.
        tokio::select! {
            () = accept => {}
            () = checks => {}
            () = ticks => {}
            () = sweeps => {}
        }
    }

    pub fn shared(&self) -> &Shared {
        &self.shared
    }

    pub fn routing(&self) -> Rc<Routing> {
        Rc::clone(&self.routing.borrow())
    }

    /// What was sent earlier may have gone by another topology.
    pub fn adopted_at(&self) -> Instant {
        self.adopted_at.get()
    }

    /// Reads the clock: once a turn (a read, a batch of answers) instead of once a command.
    pub fn read_clock(&self) {
        self.now.set(Instant::now());
        self.now_ms.set(crate::clients::unix_ms());
    }

    /// The time of this turn.
    pub fn now(&self) -> Instant {
        self.now.get()
    }

    pub fn now_ms(&self) -> u64 {
        self.now_ms.get()
    }

    pub fn large_permits(&self) -> Arc<Semaphore> {
        Arc::clone(&self.large_permits)
    }

    pub fn read_buffer(&self) -> RefMut<'_, Vec<u8>> {
        self.read_buffer.borrow_mut()
    }

    /// An empty buffer for replies.
    pub fn take_buffer(&self) -> Vec<u8> {
        self.spare_buffers.borrow_mut().pop().unwrap_or_default()
    }

    /// Takes back a buffer whose bytes have left.
    pub fn give_buffer(&self, mut buffer: Vec<u8>) {
        let mut spare = self.spare_buffers.borrow_mut();
        if spare.len() < SPARE_BUFFERS_MAX && buffer.capacity() <= SPARE_BUFFER_BYTES_MAX {
            buffer.clear();
            spare.push(buffer);
        }
    }

    /// Runs a task of a connection; it ends with the worker at the latest.
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        tokio::task::spawn_local(task);
    }

    /// The link to a store, opened when it is first asked for.
    pub fn link(self: &Rc<Self>, store: StoreId) -> Rc<Link> {
        if let Some((_, link)) = self.links.borrow().iter().find(|(known, _)| *known == store) {
            return Rc::clone(link);
        }
        let link = Rc::new(Link::new(store));
        self.links.borrow_mut().push((store, Rc::clone(&link)));
        let worker = Rc::clone(self);
        self.spawn(Rc::clone(&link).run(Arc::clone(&self.connector), move || worker.routing()));
        link
    }

    /// Looks at the connection again in a few milliseconds.
    pub fn check_later(&self, connection: &Rc<Connection>) {
        if connection.is_first_to_ask_for_check() {
            self.to_check.borrow_mut().push(Rc::clone(connection));
        }
        self.check_wanted.notify_one();
    }

    async fn run_checks(&self) {
        loop {
            self.check_wanted.notified().await;
            tokio::time::sleep(CHECK_INTERVAL).await;
            self.read_clock();
            let due = std::mem::take(&mut *self.to_check.borrow_mut());
            due.iter().for_each(Connection::check);
        }
    }

    async fn run_sweeps(&self) {
        let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
        // A worker that was held up itself gives the answers that have come meanwhile a chance.
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            sweep.tick().await;
            self.read_clock();
            let (routing, deadline) = (self.routing(), self.shared.settings.request_deadline());
            self.open_links().iter().for_each(|(_, link)| link.give_up_late(self.now(), deadline, &routing));
        }
    }

    fn open_links(&self) -> Vec<(StoreId, Rc<Link>)> {
        self.links.borrow().clone()
    }

    async fn run_ticks(&self) {
        let mut second = tokio::time::interval(Duration::from_secs(1));
        loop {
            second.tick().await;
            self.read_clock();
            let connections: Vec<Rc<Connection>> =
                self.connections.borrow().iter().map(|(_, connection)| Rc::clone(connection)).collect();
            connections.iter().for_each(|connection| connection.tick());
        }
    }

    /// Routes by this snapshot from now on.
    pub fn adopt(&self, snapshot: Arc<Snapshot>) {
        self.read_clock();
        self.adopted_at.set(self.now());
        let routing = Rc::new(Routing::new(snapshot));
        let before = self.routing.replace(Rc::clone(&routing));
        for (store, link) in self.open_links() {
            let address = |routing: &Routing| routing.snapshot.store(store).map(|store| store.address.clone());
            if routing.is_up(store) && (!before.is_up(store) || address(&before) != address(&routing)) {
                link.note_return();
            }
            link.follow(&routing);
        }
        // Whoever waits for this topology need not wait for the next look.
        let due = std::mem::take(&mut *self.to_check.borrow_mut());
        due.iter().for_each(Connection::check);
    }

    fn accept(self: &Rc<Self>, socket: NewSocket, load: &Arc<AtomicUsize>) {
        let clients = &self.shared.clients;
        let (socket, client) = match socket {
            NewSocket::Tcp { socket, peer, local } => match TcpStream::from_std(socket) {
                Ok(socket) => (Socket::Tcp(socket), clients.register(peer, local, false)),
                Err(_) => return forget(load),
            },
            NewSocket::Unix { socket, path } => match UnixStream::from_std(socket) {
                Ok(socket) => (Socket::Unix(socket), clients.register(format!("{path}:0"), format!("{path}:0"), true)),
                Err(_) => return forget(load),
            },
        };
        let id = client.id;
        let key = {
            let mut connections = self.connections.borrow_mut();
            let entry = connections.vacant_entry();
            let key = entry.key();
            entry.insert(Rc::new(Connection::new(key as u32, socket, Rc::clone(self), Session::new(client))));
            key
        };
        let connection = Rc::clone(&self.connections.borrow()[key]);
        let (worker, load) = (Rc::clone(self), Arc::clone(load));
        self.spawn(async move {
            connection.run().await;
            worker.connections.borrow_mut().remove(key);
            worker.shared.clients.remove(id);
            forget(&load);
        });
    }

    /// Answers what was asked, closes all connections, and gives up after [`DRAIN_TIMEOUT`].
    async fn drain(&self) {
        let connections: Vec<Rc<Connection>> =
            self.connections.borrow().iter().map(|(_, connection)| Rc::clone(connection)).collect();
        connections.iter().for_each(|connection| connection.drain());
        let until = tokio::time::Instant::now() + DRAIN_TIMEOUT;
        while !self.connections.borrow().is_empty() && tokio::time::Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// One connection less; the acceptor counted it when it chose the worker, so that a burst of connections is spread.
fn forget(load: &AtomicUsize) {
    load.fetch_sub(1, Ordering::Relaxed);
}
