//! Clusters of real processes: everything in one, or master, stores and gateways on their own.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::connection::{Address, Connection};
use crate::eventually::{PATIENCE, eventually_within};
use crate::node::{Node, READY_TIMEOUT, free_address};

/// A folder of its own for one test.
pub fn temporary_directory() -> TempDir {
    tempfile::Builder::new()
        .prefix("vasto-test-")
        .tempdir()
        .unwrap_or_else(|error| panic!("no temporary folder: {error}"))
}

fn text(path: &Path) -> String {
    path.to_str().expect("temporary folders have names of plain text").to_owned()
}

/// Waits until a write and a read succeed: the keyspace exists and its shards serve.
pub fn wait_until_serving(address: &Address) {
    eventually_within(PATIENCE, &format!("{address} serves"), || {
        let mut connection = Connection::try_open(address).map_err(|error| error.to_string())?;
        // Asks every shard, and changes nothing.
        match connection.try_call(&["DBSIZE"]) {
            Ok(value) if !value.is_error() => Ok(()),
            Ok(value) => Err(value.text()),
            Err(error) => Err(error.to_string()),
        }
    });
}

/// `vasto server`: all roles in one process.
pub struct Server {
    pub node: Node,
    data: PathBuf,
    /// Dropped last: the process writes here.
    _directory: TempDir,
}

impl Server {
    pub fn start() -> Server {
        Server::start_with::<&str>(&[])
    }

    pub fn start_with<A: AsRef<str>>(options: &[A]) -> Server {
        Server::start_in(options, &[])
    }

    /// With more variables in the environment of the process.
    pub fn start_in<A: AsRef<str>>(options: &[A], environment: &[(String, String)]) -> Server {
        let directory = temporary_directory();
        let data = directory.path().join("data");
        let mut arguments =
            vec!["server".to_owned(), "--listen".to_owned(), free_address(), "--data".to_owned(), text(&data)];
        arguments.extend(options.iter().map(|option| option.as_ref().to_owned()));
        let mut node = Node::launch_in("server", directory.path(), &arguments, environment);
        node.wait_ready(READY_TIMEOUT);
        wait_until_serving(&node.redis_address());
        Server { node, data, _directory: directory }
    }

    pub fn address(&self) -> Address {
        self.node.redis_address()
    }

    pub fn connect(&self) -> Connection {
        Connection::open(&self.address())
    }

    /// Where its data lie.
    pub fn data(&self) -> &Path {
        &self.data
    }
}

/// Master, stores and gateways as processes of their own.
pub struct Cluster {
    pub gateways: Vec<Node>,
    pub stores: Vec<Node>,
    pub master: Node,
    master_address: String,
    directory: TempDir,
}

/// What a cluster shall be made of.
#[derive(Clone, Debug)]
pub struct ClusterBuilder {
    stores: usize,
    gateways: usize,
    shards: usize,
    gateway_options: Vec<String>,
}

impl Cluster {
    pub fn builder() -> ClusterBuilder {
        ClusterBuilder { stores: 3, gateways: 1, shards: 3, gateway_options: Vec::new() }
    }

    /// The address of a gateway.
    pub fn address(&self, gateway: usize) -> Address {
        self.gateways[gateway].redis_address()
    }

    pub fn connect(&self, gateway: usize) -> Connection {
        Connection::open(&self.address(gateway))
    }

    /// One more gateway, not waited for.
    pub fn launch_gateway(&mut self) -> &mut Node {
        let name = format!("gateway-{}", self.gateways.len());
        let node = launch_gateway(&name, &self.directory, &self.master_address, &[]);
        self.gateways.push(node);
        self.gateways.last_mut().expect("it was just added")
    }

    /// All processes, gateways first: the order in which they stop best.
    pub fn nodes(&mut self) -> impl Iterator<Item = &mut Node> {
        self.gateways.iter_mut().chain(self.stores.iter_mut()).chain(std::iter::once(&mut self.master))
    }

    /// SIGTERM to all, and waits; a status other than success is a failure.
    pub fn terminate(&mut self) {
        for node in self.nodes() {
            let status = node.terminate();
            assert!(status.success(), "{} ended with {status}", node.name);
        }
    }

    pub fn kill_9(&mut self) {
        for node in self.nodes() {
            node.kill_9();
        }
    }

    /// Starts all that were stopped, and waits until every gateway serves.
    pub fn start_again(&mut self) {
        self.master.start_again();
        for node in self.stores.iter_mut().chain(self.gateways.iter_mut()) {
            node.start_again_without_waiting();
        }
        self.wait_until_serving();
    }

    pub fn wait_until_serving(&mut self) {
        for node in self.stores.iter_mut().chain(self.gateways.iter_mut()) {
            node.wait_ready(crate::node::READY_TIMEOUT);
        }
        for gateway in &self.gateways {
            wait_until_serving(&gateway.redis_address());
        }
    }
}

impl ClusterBuilder {
    pub fn stores(mut self, count: usize) -> Self {
        self.stores = count;
        self
    }

    pub fn gateways(mut self, count: usize) -> Self {
        self.gateways = count;
        self
    }

    pub fn shards(mut self, count: usize) -> Self {
        self.shards = count;
        self
    }

    /// An option for every gateway.
    pub fn gateway_option(mut self, name: &str, value: &str) -> Self {
        self.gateway_options.extend([name.to_owned(), value.to_owned()]);
        self
    }

    /// Starts everything and waits until it serves.
    pub fn start(self) -> Cluster {
        let directory = temporary_directory();
        let master_address = free_address();
        let master = launch_master(&directory, &master_address, self.shards, self.stores);
        let stores = (0..self.stores)
            .map(|number| launch_store(&format!("store-{number}"), &directory, &master_address))
            .collect();
        let gateways = (0..self.gateways)
            .map(|number| {
                launch_gateway(&format!("gateway-{number}"), &directory, &master_address, &self.gateway_options)
            })
            .collect();
        let mut cluster = Cluster { gateways, stores, master, master_address, directory };
        cluster.master.wait_ready(crate::node::READY_TIMEOUT);
        cluster.wait_until_serving();
        cluster
    }
}

/// A master that makes keyspace `0` of so many shards when so many stores have come.
pub fn launch_master(directory: &TempDir, address: &str, shards: usize, stores: usize) -> Node {
    Node::launch(
        "master",
        directory.path(),
        &[
            "master",
            "--listen",
            address,
            "--bootstrap-shards",
            &shards.to_string(),
            "--bootstrap-stores",
            &stores.to_string(),
        ],
    )
}

pub fn launch_store(name: &str, directory: &TempDir, master_address: &str) -> Node {
    let data = text(&directory.path().join(name));
    let listen = free_address();
    Node::launch(name, directory.path(), &["store", "--master", master_address, "--listen", &listen, "--data", &data])
}

pub fn launch_gateway(name: &str, directory: &TempDir, master_address: &str, options: &[String]) -> Node {
    let mut arguments = vec![
        "gateway".to_owned(),
        "--master".to_owned(),
        master_address.to_owned(),
        "--listen".to_owned(),
        free_address(),
    ];
    arguments.extend(options.iter().cloned());
    Node::launch(name, directory.path(), &arguments)
}
