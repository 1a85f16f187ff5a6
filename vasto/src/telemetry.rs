//! Logs on standard error, metrics for Prometheus.

use std::io::IsTerminal;
use std::net::{SocketAddr, TcpListener};

use anyhow::Context;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder};
use tokio::task::JoinSet;
use tracing_subscriber::EnvFilter;

use crate::cli::ProcessOptions;

/// Seconds; from a cached GET to a command that meets its deadline.
const SECONDS_BUCKETS: [f64; 14] =
    [0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0];
/// Operations in a batch.
const OPERATIONS_BUCKETS: [f64; 12] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0];

/// Logs go to standard error, so that standard output has the ready line alone.
pub fn log(filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter).with_context(|| format!("log filter '{filter}'"))?;
    let colored = std::io::stderr().is_terminal();
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colored);
    subscriber.try_init().map_err(|error| anyhow::anyhow!("start logging: {error}"))
}

/// The endpoint that Prometheus asks, if one is wanted; it ends when this is dropped.
#[derive(Debug, Default)]
pub struct Metrics {
    address: Option<SocketAddr>,
    _tasks: JoinSet<()>,
}

impl Metrics {
    /// Starts the endpoint; from now on metrics are recorded. Needs a runtime.
    pub fn serve(options: &ProcessOptions) -> anyhow::Result<Metrics> {
        let Some(wanted) = options.metrics_addr else {
            return Ok(Metrics::default());
        };
        let context = || format!("cannot listen for metrics on {wanted}");
        let address = with_port(wanted).with_context(context)?;
        let builder = PrometheusBuilder::new()
            .with_http_listener(address)
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS_BUCKETS)
            .and_then(|builder| {
                builder.set_buckets_for_metric(Matcher::Suffix("_operations".to_owned()), &OPERATIONS_BUCKETS)
            })
            .context("set up metrics")?;
        let (recorder, exporter) = builder.build().with_context(context)?;
        metrics::set_global_recorder(recorder).map_err(|error| anyhow::anyhow!("set up metrics: {error}"))?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            if exporter.await.is_err() {
                tracing::error!("the metrics endpoint failed");
            }
        });
        Ok(Metrics { address: Some(address), _tasks: tasks })
    }

    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }
}

/// Chooses a free port for port 0. The exporter binds the address itself and does not say which port it got, so this one
/// asks first; that another process takes it in between is as unlikely as it is harmless: the start fails and says so.
fn with_port(address: SocketAddr) -> std::io::Result<SocketAddr> {
    if address.port() == 0 { TcpListener::bind(address)?.local_addr() } else { Ok(address) }
}
