//! `vasto master`: a master on its own.

use std::time::Duration;

use anyhow::Context;
use vasto_master::{Config, Master};

use crate::cli::MasterOptions;
use crate::ready::ReadyLine;
use crate::stop::Stop;
use crate::telemetry::Metrics;

pub fn run(options: MasterOptions) -> anyhow::Result<()> {
    super::prepare(&options.process)?;
    super::block_on(serve(options))
}

async fn serve(options: MasterOptions) -> anyhow::Result<()> {
    let stop = Stop::on_signals()?;
    let metrics = Metrics::serve(&options.process)?;
    let config = Config {
        listen: options.listen,
        advertise: options.advertise,
        replace_after: Duration::from_secs(options.replace_after),
        bootstrap_shards: options.bootstrap_shards,
        bootstrap_stores: options.bootstrap_stores.map(usize::from),
        ..Config::default()
    };
    let master = Master::bind(config).await.with_context(|| format!("cannot listen on {}", options.listen))?;
    ReadyLine::new("master").with("grpc", master.address()).with_metrics(&metrics).print()?;
    master.run(stop.token()).await?;
    eprintln!("stopped");
    Ok(())
}
