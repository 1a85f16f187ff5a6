//! The master of Vasto: watches stores, creates keyspace `0` in an empty cluster and streams the topology to gateways.
//!
//! It keeps nothing on disk. The stores hold the cluster id and all records; whatever the master knows it has from their
//! reports, so a restart rebuilds it and the data path does not notice. Of several masters one leads; the others stand by.
//!
//! `rpc` speaks gRPC, `driver` owns the one copy of `state` and carries out what it decides, `leadership` says whether this master leads and
//! what it asks of the holders, `keyspaces` decides on new, altered and dropped keyspaces, `failover` on who leads a shard, `copies` on who holds
//! it, both by what `standing` has heard; `resizing` on the steps to another number of shards and `replacing` on those away from a store, both by
//! what `progress` has noted beside; `operations` says what can be asked for of the two; `place` chooses stores.

mod copies;
mod driver;
mod failover;
mod keyspaces;
mod leadership;
#[cfg(test)]
mod model;
mod operations;
mod place;
mod progress;
mod replacing;
mod resizing;
mod rpc;
mod standing;
mod state;

pub use rpc::ServeError as RunError;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use vasto_proto::slot::SHARD_COUNT_MAX;

/// Where the master listens and how it starts a cluster.
#[derive(Clone, Debug)]
pub struct Config {
    pub listen: SocketAddr,
    /// Shards of keyspace `0`, which the master creates in an empty cluster; 1 to [`SHARD_COUNT_MAX`].
    pub bootstrap_shards: u16,
    /// How many stores must have registered before it does so; as many as there are shards if not given.
    pub bootstrap_stores: Option<usize>,
    /// host:port where stores and gateways reach this master, if it is another than `listen`: so it names itself.
    pub advertise: Option<String>,
    /// A holder of the records that is down for so long is replaced by another store, and so are its copies.
    pub replace_after: Duration,
    /// A store that has not reported for so long counts as down.
    pub silence_max: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 7100)),
            bootstrap_shards: 1,
            bootstrap_stores: None,
            advertise: None,
            // Longer than a machine takes to start again; a copy of much data takes as long.
            replace_after: Duration::from_secs(300),
            // Four heartbeats of 500 ms: one lost to a busy machine is no reason to call a store down.
            silence_max: Duration::from_secs(2),
        }
    }
}

impl Config {
    fn limits(&self) -> state::Limits {
        state::Limits {
            bootstrap_shards: self.bootstrap_shards,
            bootstrap_stores: self.bootstrap_stores.unwrap_or(usize::from(self.bootstrap_shards)).max(1),
            silence_max: self.silence_max,
            replace_after: self.replace_after,
        }
    }
}

/// A master that can be started.
#[derive(Debug)]
pub struct Master;

impl Master {
    /// Takes the address; nothing is answered before [`Bound::run`].
    pub async fn bind(config: Config) -> io::Result<Bound> {
        if !(1..=SHARD_COUNT_MAX).contains(&config.bootstrap_shards) {
            let text = format!("a keyspace needs 1 to {SHARD_COUNT_MAX} shards, not {}", config.bootstrap_shards);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let listener = TcpListener::bind(config.listen).await?;
        let address = listener.local_addr()?;
        // Nobody reaches an address that stands for all: stores then call this master as they were told.
        let own = if address.ip().is_unspecified() { String::new() } else { address.to_string() };
        let advertised = config.advertise.clone().unwrap_or(own);
        Ok(Bound { listener, address, advertised, limits: config.limits() })
    }
}

/// A master that has its address.
#[derive(Debug)]
pub struct Bound {
    listener: TcpListener,
    address: SocketAddr,
    advertised: String,
    limits: state::Limits,
}

impl Bound {
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown`; then ends every stream, waits for its tasks and returns.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), RunError> {
        // The driver also stops when the server fails, so that nothing outlives this call.
        let stop = shutdown.child_token();
        let state = state::State::new(self.limits, self.advertised, fastrand::u64(1..));
        let (driver, link) = driver::Driver::new(state, stop.clone());
        let service = rpc::Service::new(Arc::new(link), stop.clone());
        let sessions = service.sessions();
        let server = rpc::serve(self.listener, service, stop.clone());
        let (served, ()) = tokio::join!(
            async {
                let served = server.await;
                stop.cancel();
                served
            },
            driver.run()
        );
        sessions.close();
        sessions.wait().await;
        served
    }
}
