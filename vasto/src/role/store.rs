//! `vasto store`: a store on its own.

use anyhow::{Context, ensure};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use vasto_store::{Config, Store, registration};

use crate::cli::StoreOptions;
use crate::ready::ReadyLine;
use crate::stop::Stop;
use crate::telemetry::Metrics;

pub fn run(options: StoreOptions) -> anyhow::Result<()> {
    super::prepare(&options.process)?;
    let unreachable = options.listen.ip().is_unspecified() && options.advertise.is_none();
    ensure!(!unreachable, "listening on {} needs --advertise HOST:PORT: where gateways reach it", options.listen);
    super::block_on(serve(options))
}

async fn serve(options: StoreOptions) -> anyhow::Result<()> {
    let stop = Stop::on_signals()?;
    // Before the store is opened, so that what it does there is recorded.
    let metrics = Metrics::serve(&options.process)?;
    let config = Config {
        data: options.data.clone(),
        listen: options.listen,
        advertise: options.advertise.clone(),
        zone: options.zone.clone(),
        tags: options.tags.clone(),
        workers: options.workers,
        ..super::store_config(&options.storage, options.proto_max_bulk_len.0, 1)
    };
    let store = tokio::task::spawn_blocking(|| Store::open(config)).await.context("open the data folder")??;
    let handle = store.handle();
    let store = store.bind().await.with_context(|| format!("cannot listen on {}", options.listen))?;
    let address = store.advertised();

    let (tasks, registered) = (TaskTracker::new(), CancellationToken::new());
    tasks.spawn(registration::run(handle.clone(), options.master.masters, address, registered.clone()));
    tasks.close();
    ReadyLine::new("store")
        .with("grpc", store.address())
        .with("store", handle.id())
        .with("data", options.data.display())
        .with_metrics(&metrics)
        .print()?;
    let served = store.run(stop.token()).await;
    // The master hears of the end when nothing is served any more.
    registered.cancel();
    tasks.wait().await;
    served?;
    eprintln!("stopped: data flushed");
    Ok(())
}
