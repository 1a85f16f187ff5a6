//! Stops the process: the first SIGTERM or SIGINT gracefully, the second at once.

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Cancels its token when the process shall stop.
#[derive(Debug)]
pub struct Stop {
    token: CancellationToken,
    /// Aborted when this is dropped.
    _tasks: JoinSet<()>,
}

impl Stop {
    /// From now on signals do not kill the process any more. Needs a runtime.
    pub fn on_signals() -> anyhow::Result<Stop> {
        let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
        let token = CancellationToken::new();
        let stop = token.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            // All are cancel safe. The token may also be cancelled by a client's SHUTDOWN.
            tokio::select! {
                _ = terminate.recv() => stop.cancel(),
                _ = interrupt.recv() => stop.cancel(),
                () = stop.cancelled() => {}
            }
            eprintln!("stopping…");
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            eprintln!("stopped at once: a second signal came");
            std::process::exit(1);
        });
        Ok(Stop { token, _tasks: tasks })
    }

    pub fn token(&self) -> CancellationToken {
        self.token.clone()
    }
}
