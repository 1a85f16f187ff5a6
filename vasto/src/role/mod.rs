//! The roles as processes: each takes its options, starts the libraries, says that it serves and stops in order.
//!
//! The runtime here is for the control plane alone; the workers of gateways and stores bring their own threads.

pub mod gateway;
pub mod master;
pub mod server;
pub mod store;

use std::future::Future;
use std::time::Duration;

use anyhow::Context;

use crate::cli::{ClientOptions, FsyncChoice, ServerOptions, StorageOptions};
use crate::{open_files, telemetry};

/// Runs the role's control plane on this thread.
fn block_on<T>(role: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
    runtime.block_on(role)
}

/// What every process does first; returns how many files it may open.
fn prepare(process: &crate::cli::ProcessOptions) -> anyhow::Result<usize> {
    telemetry::log(&process.log)?;
    Ok(open_files::raise_limit())
}

fn gateway_config(
    listen: &[std::net::SocketAddr],
    clients: &ClientOptions,
    maxclients: usize,
) -> vasto_gateway::Config {
    vasto_gateway::Config {
        listen: listen.to_vec(),
        unixsocket: clients.unixsocket.clone(),
        workers: clients.workers,
        maxclients,
        timeout_seconds: clients.timeout,
        tcp_keepalive_seconds: clients.tcp_keepalive,
        proto_max_bulk_len: clients.proto_max_bulk_len.0,
        client_query_buffer_limit: clients.client_query_buffer_limit.0,
        output_buffer_limit: clients.output_buffer_limit.0,
        output_stall_timeout: Duration::from_secs(clients.output_stall_timeout),
        databases: clients.databases,
        request_deadline: Duration::from_millis(clients.request_deadline_ms),
        ..vasto_gateway::Config::default()
    }
}

/// The part of a store's configuration that storage options give, for one of `stores` stores that share the memory.
fn store_config(storage: &StorageOptions, proto_max_bulk_len: usize, stores: usize) -> vasto_store::Config {
    vasto_store::Config {
        memory: vasto_store::MemoryConfig {
            row_cache_bytes: storage.row_cache.0 / stores,
            block_cache_bytes: storage.block_cache.0 / stores,
            write_buffer_bytes: storage.write_buffer.0 / stores,
        },
        lane_threads: usize::from(storage.lane_threads),
        proto_max_bulk_len,
        gc_grace: Duration::from_secs(storage.gc_grace),
        max_clock_skew: Duration::from_millis(storage.max_clock_skew),
        fsync: match storage.fsync {
            FsyncChoice::Always => vasto_store::Fsync::Always,
            FsyncChoice::Everysec => vasto_store::Fsync::EverySecond,
            FsyncChoice::No => vasto_store::Fsync::Never,
        },
        max_open_files: i32::from(storage.max_open_files),
        background_jobs: i32::from(storage.background_jobs),
        background_bytes_per_second: storage.background_rate.0 as u64,
        resize_bytes_per_second: storage.resize_rate.saturating_mul(1_000_000),
        verify_interval: Duration::from_secs(storage.verify_interval),
        ..vasto_store::Config::default()
    }
}

impl ServerOptions {
    fn shard_count(&self, stores: usize) -> u16 {
        self.shards.unwrap_or_else(|| u16::try_from(stores).unwrap_or(u16::MAX))
    }
}
