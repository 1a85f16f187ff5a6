//! What all workers of one gateway process share.

use crate::clients::Clients;
use crate::process::Memory;
use crate::settings::Settings;
use crate::slowlog::Slowlog;
use crate::statistics::Statistics;
use crate::upstream::masters::Masters;
use std::time::{Instant, SystemTime};
use tokio_util::sync::CancellationToken;

/// Shared by all workers; everything in it is safe to use from any of them.
#[derive(Debug)]
pub struct Shared {
    pub settings: Settings,
    pub clients: Clients,
    pub slowlog: Slowlog,
    pub statistics: Statistics,
    pub masters: Masters,
    pub started: Instant,
    pub started_at: SystemTime,
    /// Memory that the process had then.
    pub started_with: Memory,
    /// 40 hexadecimal digits, drawn at start.
    pub run_id: String,
    /// Cancelled to stop the gateway, also by SHUTDOWN.
    pub shutdown: CancellationToken,
}
