//! The master of Vasto: watches stores, creates keyspace `0` in an empty cluster and streams the topology to gateways.
//!
//! It keeps nothing on disk. The stores hold the cluster id and all records; whatever the master knows it has from their
//! reports, so a restart rebuilds it and the data path does not notice.
//!
//! `rpc` speaks gRPC, `driver` owns the one copy of `state` and carries out what it decides, `keyspaces` decides on new and dropped ones,
//! `place` chooses stores.

mod driver;
mod keyspaces;
mod place;
mod rpc;
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
    /// A store that has not reported for so long counts as down.
    pub silence_max: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 7100)),
            bootstrap_shards: 1,
            bootstrap_stores: None,
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
        Ok(Bound { listener, address, limits: config.limits() })
    }
}

/// A master that has its address.
#[derive(Debug)]
pub struct Bound {
    listener: TcpListener,
    address: SocketAddr,
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
        let (driver, link) = driver::Driver::new(state::State::new(self.limits), stop.clone());
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
