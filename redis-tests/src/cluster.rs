//! Clusters of real processes: everything in one, or master, stores and gateways on their own.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::connection::{Address, Connection};
use crate::eventually::{PATIENCE, eventually_within};
use crate::network::{Host, Network};
use crate::node::{Node, READY_TIMEOUT, free_address};
use crate::resp::Value;

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

    /// In an environment of its own beside that of the tests.
    pub fn start_in<A: AsRef<str>>(options: &[A], environment: &[(String, String)]) -> Server {
        let directory = temporary_directory();
        let data = directory.path().join("data");
        let mut node = launch_server(directory.path(), &data, options, environment);
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

/// Masters, stores and gateways as processes of their own.
pub struct Cluster {
    pub gateways: Vec<Node>,
    pub stores: Vec<Node>,
    pub master: Node,
    /// The masters beside the first.
    pub more_masters: Vec<Node>,
    /// As they said when they began to serve: one that is down cannot be asked.
    store_ids: Vec<String>,
    /// All masters, as `--master` takes them.
    master_address: String,
    /// Those of every store.
    store_options: Vec<String>,
    directory: TempDir,
    /// Where each process runs, if they have a network of their own.
    pub hosts: Option<Hosts>,
    /// Dropped last: the processes are in it.
    _network: Option<Network>,
}

/// Where the processes of a cluster run.
#[derive(Clone, Debug)]
pub struct Hosts {
    pub masters: Vec<Host>,
    pub stores: Vec<Host>,
    pub gateways: Vec<Host>,
}

impl Hosts {
    pub fn all(&self) -> impl Iterator<Item = &Host> {
        self.masters.iter().chain(&self.stores).chain(&self.gateways)
    }

    /// Every packet arrives again, everywhere.
    pub fn heal(&self) {
        self.all().for_each(Host::heal);
    }
}

/// What a cluster shall be made of.
#[derive(Debug)]
pub struct ClusterBuilder {
    masters: usize,
    stores: usize,
    gateways: usize,
    shards: usize,
    master_options: Vec<String>,
    store_options: Vec<String>,
    /// For the stores with these numbers.
    store_environments: Vec<(usize, Vec<(String, String)>)>,
    gateway_options: Vec<String>,
    network: Option<Network>,
}

/// A shard as a gateway sees it.
#[derive(Clone, Debug)]
pub struct ShardPlace {
    pub shard: i64,
    pub epoch: i64,
    /// The number of the store in the cluster; `None` while there is no primary.
    pub primary: Option<usize>,
    pub is_up: bool,
    pub replicas: Vec<usize>,
}

impl Cluster {
    pub fn builder() -> ClusterBuilder {
        ClusterBuilder {
            masters: 1,
            stores: 3,
            gateways: 1,
            shards: 3,
            master_options: Vec::new(),
            store_options: Vec::new(),
            store_environments: Vec::new(),
            gateway_options: Vec::new(),
            network: None,
        }
    }

    pub fn masters(&self) -> impl Iterator<Item = &Node> {
        std::iter::once(&self.master).chain(&self.more_masters)
    }

    pub fn store_id(&self, store: usize) -> &str {
        &self.store_ids[store]
    }

    /// The store with this id, by its number in the cluster.
    pub fn store_number(&self, id: &str) -> Option<usize> {
        self.store_ids.iter().position(|known| known == id)
    }

    /// Where the shards of a keyspace are, as this connection's gateway knows it: it asks no store for that.
    pub fn places(&self, connection: &mut Connection, keyspace: &str) -> Result<Vec<ShardPlace>, String> {
        let topology = connection.try_call(&["TOPOLOGY"]).map_err(|error| error.to_string())?;
        let shards = topology.elements().ok_or_else(|| topology.text())?;
        let is_of_keyspace = |shard: &&Value| shard.field("keyspace").is_some_and(|name| name.text() == keyspace);
        let place = |shard: &Value| {
            let number = |name| shard.field(name).and_then(|value| value.integer());
            let text = |name| shard.field(name).map(|value| value.text()).unwrap_or_default();
            let replicas = shard.field("replicas").and_then(|replicas| replicas.elements()).unwrap_or_default();
            ShardPlace {
                shard: number("shard").unwrap_or(-1),
                epoch: number("epoch").unwrap_or(-1),
                primary: self.store_number(&text("primary")),
                is_up: text("state") == "up",
                replicas: replicas.iter().filter_map(|replica| self.store_number(&replica.text())).collect(),
            }
        };
        Ok(shards.iter().filter(is_of_keyspace).map(place).collect())
    }

    /// The address of a gateway.
    pub fn address(&self, gateway: usize) -> Address {
        self.gateways[gateway].redis_address()
    }

    pub fn connect(&self, gateway: usize) -> Connection {
        Connection::open(&self.address(gateway))
    }

    /// Where the data of a store lie.
    pub fn data(&self, store: usize) -> PathBuf {
        self.directory.path().join(format!("store-{store}"))
    }

    /// One more gateway, not waited for.
    pub fn launch_gateway(&mut self) -> &mut Node {
        let name = format!("gateway-{}", self.gateways.len());
        let node = launch_gateway(&name, &self.directory, &self.master_address, &[]);
        self.gateways.push(node);
        self.gateways.last_mut().expect("it was just added")
    }

    /// One more store, not waited for.
    pub fn launch_store(&mut self) -> &mut Node {
        let name = format!("store-{}", self.stores.len());
        let data = text(&self.directory.path().join(&name));
        let mut arguments = store_arguments(&self.master_address, &free_address(), &data);
        arguments.extend(self.store_options.iter().cloned());
        self.stores.push(Node::launch(&name, self.directory.path(), &arguments));
        self.stores.last_mut().expect("it was just added")
    }

    /// One more store, which the gateways know when this returns; its number.
    pub fn add_store(&mut self) -> usize {
        self.launch_store().wait_ready(READY_TIMEOUT);
        let number = self.stores.len() - 1;
        self.store_ids.push(self.stores[number].store_id());
        for gateway in 0..self.gateways.len() {
            let mut connection = self.connect(gateway);
            crate::eventually!("the new store is known", {
                let stores = connection.call(&["STORES"]).elements().unwrap_or_default();
                let is_new = |store: &&Value| store.field("id").is_some_and(|id| id.text() == self.store_ids[number]);
                let new = stores.iter().find(is_new).and_then(|store| store.field("state"));
                new.is_some_and(|state| state.text() == "up")
            });
        }
        number
    }

    /// One of the masters, the first is 0.
    pub fn master(&mut self, number: usize) -> &mut Node {
        match number {
            0 => &mut self.master,
            number => &mut self.more_masters[number - 1],
        }
    }

    /// All processes, gateways first: the order in which they stop best.
    pub fn nodes(&mut self) -> impl Iterator<Item = &mut Node> {
        self.gateways
            .iter_mut()
            .chain(self.stores.iter_mut())
            .chain(std::iter::once(&mut self.master))
            .chain(self.more_masters.iter_mut())
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
        self.more_masters.iter_mut().for_each(Node::start_again);
        for node in self.stores.iter_mut().chain(self.gateways.iter_mut()) {
            node.start_again_without_waiting();
        }
        self.wait_until_serving();
    }

    pub fn wait_until_serving(&mut self) {
        for node in self.stores.iter_mut().chain(self.gateways.iter_mut()) {
            node.wait_ready(READY_TIMEOUT);
        }
        for gateway in &self.gateways {
            wait_until_serving(&gateway.redis_address());
        }
    }
}

impl ClusterBuilder {
    /// One leads, the others stand by.
    pub fn masters(mut self, count: usize) -> Self {
        self.masters = count;
        self
    }

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

    /// An option for every master.
    pub fn master_option(mut self, name: &str, value: &str) -> Self {
        self.master_options.extend([name.to_owned(), value.to_owned()]);
        self
    }

    /// An option for every store.
    pub fn store_option(mut self, name: &str, value: &str) -> Self {
        self.store_options.extend([name.to_owned(), value.to_owned()]);
        self
    }

    /// For one store, beside the environment of the tests.
    pub fn store_environment(mut self, store: usize, environment: &[(String, String)]) -> Self {
        self.store_environments.push((store, environment.to_vec()));
        self
    }

    /// An option for every gateway.
    pub fn gateway_option(mut self, name: &str, value: &str) -> Self {
        self.gateway_options.extend([name.to_owned(), value.to_owned()]);
        self
    }

    /// Each process on a host of its own.
    pub fn network(mut self, network: Network) -> Self {
        self.network = Some(network);
        self
    }

    /// Starts everything and waits until it serves.
    pub fn start(mut self) -> Cluster {
        let directory = temporary_directory();
        let hosts = self.network.as_mut().map(|network| {
            let mut hosts = |count| (0..count).map(|_| network.add_host()).collect();
            Hosts { masters: hosts(self.masters), stores: hosts(self.stores), gateways: hosts(self.gateways) }
        });
        let listen = |host: Option<&Host>, port: u16| match host {
            Some(host) => format!("{}:{port}", host.address),
            None => free_address(),
        };
        let masters: Vec<(Option<&Host>, String)> = (0..self.masters)
            .map(|number| hosts.as_ref().map(|hosts| &hosts.masters[number]))
            .map(|host| (host, listen(host, 7100)))
            .collect();
        let master_address = masters.iter().map(|(_, address)| address.as_str()).collect::<Vec<_>>().join(",");
        let mut masters = masters.iter().enumerate().map(|(number, (host, address))| {
            let name = if number == 0 { "master".to_owned() } else { format!("master-{number}") };
            let mut arguments = master_arguments(address, self.shards, self.stores);
            arguments.extend(self.master_options.iter().cloned());
            Node::launch_on(*host, &name, directory.path(), &arguments, &[])
        });
        let master = masters.next().expect("there is a master");
        let more_masters = masters.collect();
        let stores = (0..self.stores)
            .map(|number| {
                let host = hosts.as_ref().map(|hosts| &hosts.stores[number]);
                let name = format!("store-{number}");
                let data = text(&directory.path().join(&name));
                let mut arguments = store_arguments(&master_address, &listen(host, 7200), &data);
                arguments.extend(self.store_options.iter().cloned());
                let environments = self.store_environments.iter().filter(|(store, _)| *store == number);
                let environment: Vec<_> = environments.flat_map(|(_, environment)| environment.clone()).collect();
                Node::launch_on(host, &name, directory.path(), &arguments, &environment)
            })
            .collect();
        let gateways = (0..self.gateways)
            .map(|number| {
                let host = hosts.as_ref().map(|hosts| &hosts.gateways[number]);
                let name = format!("gateway-{number}");
                let mut arguments = gateway_arguments(&master_address, &listen(host, 6379));
                arguments.extend(self.gateway_options.iter().cloned());
                Node::launch_on(host, &name, directory.path(), &arguments, &[])
            })
            .collect();
        let network = self.network;
        let mut cluster = Cluster {
            gateways,
            stores,
            master,
            more_masters,
            store_ids: Vec::new(),
            master_address,
            store_options: self.store_options,
            directory,
            hosts,
            _network: network,
        };
        cluster.master.wait_ready(READY_TIMEOUT);
        cluster.more_masters.iter_mut().for_each(|master| master.wait_ready(READY_TIMEOUT));
        cluster.wait_until_serving();
        cluster.store_ids = cluster.stores.iter().map(Node::store_id).collect();
        cluster
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn master_arguments(listen: &str, shards: usize, stores: usize) -> Vec<String> {
    let (shards, stores) = (shards.to_string(), stores.to_string());
    words(&["master", "--listen", listen, "--bootstrap-shards", &shards, "--bootstrap-stores", &stores])
}

fn store_arguments(masters: &str, listen: &str, data: &str) -> Vec<String> {
    words(&["store", "--master", masters, "--listen", listen, "--data", data])
}

fn gateway_arguments(masters: &str, listen: &str) -> Vec<String> {
    words(&["gateway", "--master", masters, "--listen", listen])
}

/// `vasto server` on a data folder; its log lies in `directory`.
pub fn launch_server<A: AsRef<str>>(
    directory: &Path,
    data: &Path,
    options: &[A],
    environment: &[(String, String)],
) -> Node {
    let mut arguments =
        vec!["server".to_owned(), "--listen".to_owned(), free_address(), "--data".to_owned(), text(data)];
    arguments.extend(options.iter().map(|option| option.as_ref().to_owned()));
    Node::launch_with("server", directory, &arguments, environment)
}

/// A master that makes keyspace `0` of so many shards when so many stores have come.
pub fn launch_master(directory: &TempDir, address: &str, shards: usize, stores: usize) -> Node {
    Node::launch("master", directory.path(), &master_arguments(address, shards, stores))
}

pub fn launch_store(name: &str, directory: &TempDir, master_address: &str) -> Node {
    let data = text(&directory.path().join(name));
    Node::launch(name, directory.path(), &store_arguments(master_address, &free_address(), &data))
}

pub fn launch_gateway(name: &str, directory: &TempDir, master_address: &str, options: &[String]) -> Node {
    let mut arguments = gateway_arguments(master_address, &free_address());
    arguments.extend(options.iter().cloned());
    Node::launch(name, directory.path(), &arguments)
}
