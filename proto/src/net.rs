//! Limits and options of the channels between roles, which both ends must hold to.

use std::time::Duration;
use tonic::transport::{Endpoint, Server};

/// Name of the metadata entry with [`crate::PROTOCOL_VERSION`].
pub const PROTOCOL_METADATA: &str = "vasto-protocol";
/// Name of the metadata entry with the cluster id, hexadecimal.
pub const CLUSTER_METADATA: &str = "vasto-cluster";

/// Most bytes of one `Frame.packed`: a longer batch leaves in pieces, so that other lanes get between them.
pub const FRAME_BYTES_MAX: usize = 1 << 20;
/// A gateway closes a batch at this size: more only delays the first commands in it.
pub const BATCH_BYTES_TARGET: usize = 512 << 10;
/// What a peer may send in one message: a frame and its envelope.
pub const MESSAGE_BYTES_MAX: usize = FRAME_BYTES_MAX + (64 << 10);
/// What a master and who speaks with it may send in one message: a thousand records with a thousand shards take some 30 MiB.
pub const CONTROL_BYTES_MAX: usize = 64 << 20;
/// Values above it are *large*: at most [`LARGE_VALUES_IN_FLIGHT`] of them are in flight per process.
pub const LARGE_VALUE_BYTES: usize = 16 << 20;
pub const LARGE_VALUES_IN_FLIGHT: usize = 2;

/// HTTP/2 keep-alive: without it a healed partition leaves calls hanging until the peer restarts.
pub const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(2);
pub const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(3);
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// HTTP/2 windows: wide enough for several batches; memory is bounded by the senders' own limits.
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// What either end takes in one HTTP/2 frame, instead of 16 KiB: a long batch is then written and read in one piece.
const HTTP2_FRAME_BYTES_MAX: u32 = FRAME_BYTES_MAX as u32;

/// Options of every channel; `address` is host:port.
pub fn endpoint(address: &str) -> Result<Endpoint, tonic::transport::Error> {
    Ok(Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(HTTP2_FRAME_BYTES_MAX))
}

/// Options of every gRPC server.
pub fn server() -> Server {
    Server::builder()
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(HTTP2_FRAME_BYTES_MAX)
}
