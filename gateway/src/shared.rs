//! What all workers of one gateway process share.

use crate::clients::Clients;
use crate::settings::Settings;
use crate::slowlog::Slowlog;
use crate::statistics::Statistics;
use std::time::{Instant, SystemTime};
use crate::upstream::masters::Masters;
use tokio_util::sync::CancellationToken;

/// Shared by all workers; everything in it is safe to use from any of them.
#[derive(Debug)]
pub struct Shared {
    pub settings: Settings,
    pub clients: Clients,
    pub slowlog: Slowlog,
    pub statistics: Statistics,
    pub started: Instant,
    pub masters: Masters,
    pub started_at: SystemTime,
    /// 40 hexadecimal digits, drawn at start.
    pub run_id: String,
    /// Cancelled to stop the gateway, also by SHUTDOWN.
    pub shutdown: CancellationToken,
}
