//! `vasto server`: master, stores and a gateway in one process; between gateway and stores there is no socket.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info};
use vasto_gateway::Gateway;
use vasto_gateway::follow::follow;
use vasto_master::Master;
use vasto_store::{Store, StoreHandle, registration};

use crate::cli::ServerOptions;
use crate::local::LocalConnector;
use crate::open_files;
use crate::ready::{self, ReadyLine};
use crate::stop::Stop;
use crate::telemetry::Metrics;

/// Stores of one process speak with each other over sockets, of copies, leases and slots that move; gateways do not use these.
const SOCKET_WORKERS: usize = 1;

const FOLDER_PREFIX: &str = "store-";

pub fn run(options: ServerOptions) -> anyhow::Result<()> {
    let open_files_limit = super::prepare(&options.process)?;
    super::block_on(serve(options, open_files_limit))
}

async fn serve(options: ServerOptions, open_files_limit: usize) -> anyhow::Result<()> {
    let stop = Stop::on_signals()?;
    let metrics = Metrics::serve(&options.process)?;
    let to_open = options.clone();
    let opened = tokio::task::spawn_blocking(move || open_stores(&to_open)).await.context("open the data folder")??;
    let handles: Vec<StoreHandle> = opened.iter().map(Store::handle).collect();

    let (tasks, control) = (TaskTracker::new(), CancellationToken::new());
    let result = async {
        let addresses = open_sockets(opened, &tasks, &control).await?;
        let stores = Stores { handles: &handles, addresses };
        serve_stores(&options, open_files_limit, &stores, &stop, &metrics, &tasks, &control).await
    };
    let result = result.await;
    control.cancel();
    tasks.close();
    tasks.wait().await;
    // Also after a failed start: what is open shall be closed in order.
    let closing = tokio::task::spawn_blocking(move || {
        handles.iter().for_each(StoreHandle::close);
    });
    closing.await.context("close the stores")?;
    result?;
    eprintln!("stopped: data flushed");
    Ok(())
}

/// The stores of this process, and where they are found.
struct Stores<'h> {
    handles: &'h [StoreHandle],
    addresses: Vec<String>,
}

/// Where the stores reach each other, in their order. A single one speaks with itself, of slots that go from one of its shards to another.
async fn open_sockets(
    opened: Vec<Store>,
    tasks: &TaskTracker,
    control: &CancellationToken,
) -> anyhow::Result<Vec<String>> {
    let mut addresses = Vec::with_capacity(opened.len());
    for store in opened {
        let bound = store.bind().await.context("cannot listen on a port of 127.0.0.1 for a store")?;
        addresses.push(bound.address().to_string());
        let stopped = control.clone();
        tasks.spawn(async move {
            if let Err(failure) = bound.run(stopped).await {
                error!(%failure, "a store's server ended");
            }
        });
    }
    Ok(addresses)
}

async fn serve_stores(
    options: &ServerOptions,
    open_files_limit: usize,
    stores: &Stores<'_>,
    stop: &Stop,
    metrics: &Metrics,
    tasks: &TaskTracker,
    control: &CancellationToken,
) -> anyhow::Result<()> {
    let handles = stores.handles;
    let shard_count = options.shard_count(handles.len());
    let master = Master::bind(vasto_master::Config {
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        bootstrap_shards: shard_count,
        bootstrap_stores: Some(handles.len()),
        ..vasto_master::Config::default()
    });
    let master = master.await.context("cannot listen on a port of 127.0.0.1 for the master")?;
    let masters = vec![master.address().to_string()];
    let stopped = control.clone();
    tasks.spawn(async move {
        if let Err(failure) = master.run(stopped).await {
            error!(%failure, "the master ended");
        }
    });
    for (handle, address) in handles.iter().zip(&stores.addresses) {
        let session = registration::run(handle.clone(), masters.clone(), address.clone(), control.clone());
        tasks.spawn(session);
    }
    let topology = follow(masters.clone(), tasks, control.clone());

    let data_files = usize::from(options.storage.max_open_files) * usize::from(shard_count);
    let maxclients = open_files::fitting_maxclients(options.clients.maxclients, data_files, open_files_limit);
    let config = vasto_gateway::Config {
        masters: masters.clone(),
        data_directory: Some(std::path::absolute(&options.data)?.display().to_string()),
        ..super::gateway_config(&options.listen, &options.clients, maxclients)
    };
    let gateway = Gateway::bind(config, Arc::new(LocalConnector::new(handles)), topology.clone()).await?;
    let line = ReadyLine::new("server")
        .with_all("redis", gateway.addresses())
        .with_all("unixsocket", options.clients.unixsocket.as_ref().map(|path| path.display()))
        .with("data", options.data.display())
        .with_metrics(metrics);

    let mut running = std::pin::pin!(gateway.run(stop.token()));
    tokio::select! {
        () = ready::wait_until_served(topology) => {
            line.print()?;
            running.await;
        }
        _ = &mut running => {}
    }
    Ok(())
}

fn open_stores(options: &ServerOptions) -> anyhow::Result<Vec<Store>> {
    let numbers = store_numbers(&options.data, options.stores);
    if numbers.len() > usize::from(options.stores) {
        info!(stores = numbers.len(), "opening all stores that the data folder has");
    }
    let open = |number: &u16| {
        let config = vasto_store::Config {
            data: options.data.join(format!("{FOLDER_PREFIX}{number}")),
            workers: SOCKET_WORKERS,
            ..super::store_config(&options.storage, options.clients.proto_max_bulk_len.0, numbers.len())
        };
        Store::open(config).map_err(anyhow::Error::from)
    };
    numbers.iter().map(open).collect()
}

/// Which stores to open: those asked for, and those of earlier starts, whose shards would be missing otherwise.
fn store_numbers(data: &Path, stores: u16) -> BTreeSet<u16> {
    let mut numbers: BTreeSet<u16> = (1..=stores).collect();
    // No folder yet: nothing of earlier starts.
    for entry in std::fs::read_dir(data).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let number: Option<u16> = name.to_str().and_then(|name| name.strip_prefix(FOLDER_PREFIX)?.parse().ok());
        numbers.extend(number.filter(|_| entry.path().is_dir()));
    }
    numbers
}

#[cfg(test)]
mod tests {

    use super::*;
    use std::time::Duration;
    use tokio::sync::watch;
    use tokio::task::JoinHandle;
    use vasto_proto::id::{ClusterId, KeyspaceId};
    use vasto_proto::topology::Snapshot;

    /// Far above what any step here takes; only a failing test waits for so long.
    const PATIENCE: Duration = Duration::from_secs(60);

    struct RunningMaster {
        address: SocketAddr,
        shutdown: CancellationToken,
        task: JoinHandle<()>,
    }

    impl RunningMaster {
        async fn start(listen: SocketAddr) -> Self {
            let config =
                vasto_master::Config { listen, bootstrap_shards: 2, bootstrap_stores: Some(2), ..Default::default() };
            let master = Master::bind(config).await.unwrap();
            let (address, shutdown) = (master.address(), CancellationToken::new());
            let stopped = shutdown.clone();
            #[expect(clippy::disallowed_methods, reason = "awaited in `stop`")]
            let task = tokio::spawn(async move { master.run(stopped).await.unwrap() });
            Self { address, shutdown, task }
        }

        async fn stop(self) {
            self.shutdown.cancel();
            self.task.await.unwrap();
        }
    }

    fn open(folder: &Path) -> Store {
        Store::open(vasto_store::Config { data: folder.to_owned(), ..Default::default() }).unwrap()
    }

    async fn until(
        topology: &mut watch::Receiver<Arc<Snapshot>>,
        condition: impl Fn(&Snapshot) -> bool,
    ) -> Arc<Snapshot> {
        let met = topology.wait_for(|snapshot| condition(snapshot));
        let snapshot = tokio::time::timeout(PATIENCE, met).await.expect("the topology becomes so").unwrap();
        Arc::clone(&snapshot)
    }

    fn stores_up(snapshot: &Snapshot) -> usize {
        snapshot.stores.iter().filter(|store| store.up).count()
    }

    /// Stores and a follower find a master that comes later, and do not mind that it is restarted.
    #[tokio::test]
    async fn stores_register_get_their_shards_and_outlive_the_master() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let opened = [open(one.path()), open(two.path())];
        let handles: Vec<StoreHandle> = opened.iter().map(Store::handle).collect();
        let master = RunningMaster::start(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await;
        let address = master.address;
        master.stop().await;

        let (tasks, control) = (TaskTracker::new(), CancellationToken::new());
        for handle in &handles {
            let masters = vec![address.to_string()];
            tasks.spawn(registration::run(handle.clone(), masters, "in-process".to_owned(), control.clone()));
        }
        let mut topology = follow(vec![address.to_string()], &tasks, control.clone());
        let master = RunningMaster::start(address).await;
        let served = until(&mut topology, |snapshot| snapshot.keyspace(KeyspaceId(0)).is_some()).await;
        assert_ne!(served.cluster, ClusterId(0));
        for handle in &handles {
            assert_eq!((handle.cluster(), handle.records()), (served.cluster, served.keyspaces.clone()));
            assert_eq!(served.keyspaces[0].shards_of(handle.id()).count(), 1);
        }

        master.stop().await;
        let master = RunningMaster::start(address).await;
        // Everything is new to this master, and nothing changes for whoever follows it.
        let again =
            until(&mut topology, |snapshot| snapshot.version < served.version && stores_up(snapshot) == 2).await;
        assert_eq!((again.cluster, &again.keyspaces), (served.cluster, &served.keyspaces));

        control.cancel();
        tasks.close();
        tokio::time::timeout(PATIENCE, tasks.wait()).await.expect("all tasks end");
        master.stop().await;
        handles.iter().for_each(StoreHandle::close);
    }

    #[test]
    fn stores_of_earlier_starts_are_opened_too() {
        let folder = tempfile::tempdir().unwrap();
        let numbers = |stores| store_numbers(folder.path(), stores).into_iter().collect::<Vec<_>>();
        assert_eq!(numbers(2), [1, 2]);
        for name in ["store-1", "store-4", "store-x", "other"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        std::fs::write(folder.path().join("store-9"), "no folder").unwrap();
        assert_eq!(numbers(2), [1, 2, 4]);
        assert_eq!(store_numbers(&folder.path().join("none"), 1).len(), 1);
    }
}
