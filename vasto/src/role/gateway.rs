//! `vasto gateway`: a gateway on its own.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use vasto_gateway::Gateway;
use vasto_gateway::follow::follow;
use vasto_gateway::upstream::GrpcConnector;

use crate::cli::GatewayOptions;
use crate::open_files;
use crate::ready::{self, ReadyLine};
use crate::stop::Stop;
use crate::telemetry::Metrics;

pub fn run(options: GatewayOptions) -> anyhow::Result<()> {
    let open_files_limit = super::prepare(&options.process)?;
    super::block_on(serve(options, open_files_limit))
}

async fn serve(options: GatewayOptions, open_files_limit: usize) -> anyhow::Result<()> {
    let stop = Stop::on_signals()?;
    let metrics = Metrics::serve(&options.process)?;
    let maxclients = open_files::fitting_maxclients(options.clients.maxclients, 0, open_files_limit);
    let masters = options.master.masters;
    let config = vasto_gateway::Config {
        masters: masters.clone(),
        ..super::gateway_config(&options.listen, &options.clients, maxclients)
    };

    let (tasks, following) = (TaskTracker::new(), CancellationToken::new());
    let topology = follow(masters, &tasks, following.clone());
    let gateway = Gateway::bind(config, Arc::new(GrpcConnector), topology.clone()).await?;
    let line = ReadyLine::new("gateway")
        .with_all("redis", gateway.addresses())
        .with_all("unixsocket", options.clients.unixsocket.as_ref().map(|path| path.display()))
        .with_metrics(&metrics);

    let mut running = std::pin::pin!(gateway.run(stop.token()));
    tokio::select! {
        () = ready::wait_until_served(topology) => {
            line.print()?;
            running.await;
        }
        _ = &mut running => {}
    }
    following.cancel();
    tasks.close();
    tasks.wait().await;
    eprintln!("stopped: all connections are closed");
    Ok(())
}
