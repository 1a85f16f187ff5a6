//! The way to a store in another process: one bidirectional gRPC stream.

use super::link::{AnswerReceiver, BatchSender, Connector, LinkError, LinkHalves, LocalFuture};
use bytes::{Bytes, BytesMut};
use std::collections::HashMap;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use vasto_proto::id::{ClusterId, StoreId};
use vasto_proto::net::{self, FRAME_BYTES_MAX, LARGE_VALUE_BYTES, LARGE_VALUES_IN_FLIGHT, MESSAGE_BYTES_MAX};
use vasto_proto::pb::{Frame, store_client::StoreClient};

/// Frames that wait to be taken by the HTTP/2 connection: one is being written, one is ready; the next batch gathers meanwhile.
const FRAMES_WAITING_MAX: usize = 2;
/// Bytes of answers that may be in pieces at once: the large values in flight, and as much again for lists of keys.
const PIECES_BYTES_MAX: usize = LARGE_VALUES_IN_FLIGHT * ((512 << 20) + LARGE_VALUE_BYTES);

/// Opens gRPC links.
#[derive(Clone, Copy, Debug, Default)]
pub struct GrpcConnector;

impl Connector for GrpcConnector {
    fn connect(
        &self,
        _store: StoreId,
        address: &str,
        cluster: ClusterId,
    ) -> LocalFuture<'static, Result<LinkHalves, LinkError>> {
        let address = address.to_owned();
        Box::pin(async move {
            let channel = net::endpoint(&address).map_err(link_error)?.connect().await.map_err(link_error)?;
            let mut client = StoreClient::new(channel)
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX);
            let (frames, outgoing) = mpsc::channel(FRAMES_WAITING_MAX);
            let mut request = tonic::Request::new(ReceiverStream::new(outgoing));
            let entries = [
                (net::PROTOCOL_METADATA, vasto_proto::PROTOCOL_VERSION.to_string()),
                (net::CLUSTER_METADATA, cluster.to_string()),
            ];
            for (name, value) in entries {
                request.metadata_mut().insert(name, value.parse().expect("digits are valid metadata"));
            }
            let opened = tokio::time::timeout(net::CONNECT_TIMEOUT, client.execute(request)).await;
            let opened = opened.map_err(|_| LinkError("the store did not open the stream in time".into()))?;
            let incoming = opened.map_err(|status| LinkError(status.message().to_owned()))?.into_inner();
            let sender = GrpcSender { frames, next_lane: 1, pieces: JoinSet::new() };
            let receiver = GrpcReceiver { incoming, partial: HashMap::new(), partial_bytes: 0 };
            Ok((Box::new(sender) as Box<dyn BatchSender>, Box::new(receiver) as Box<dyn AnswerReceiver>))
        })
    }
}

fn link_error(error: tonic::transport::Error) -> LinkError {
    use std::error::Error;
    LinkError(error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}")))
}

#[derive(Debug)]
struct GrpcSender {
    frames: mpsc::Sender<Frame>,
    next_lane: u32,
    /// Batches that leave in pieces, beside the small ones.
    pieces: JoinSet<()>,
}

impl BatchSender for GrpcSender {
    fn send(&mut self, batch: Bytes) -> LocalFuture<'_, Result<(), LinkError>> {
        Box::pin(async move {
            if batch.len() <= FRAME_BYTES_MAX {
                let sent = self.frames.send(Frame { packed: batch, lane: 0, more: false }).await;
                return sent.map_err(|_| LinkError("the stream is closed".into()));
            }
            // A long batch is one operation of one connection, which sends nothing else until it is answered: others may pass it.
            while self.pieces.try_join_next().is_some() {}
            let lane = self.next_lane;
            self.next_lane = self.next_lane.checked_add(1).unwrap_or(1);
            let frames = self.frames.clone();
            self.pieces.spawn_local(async move {
                let mut rest = batch;
                while !rest.is_empty() {
                    let packed = rest.split_to(rest.len().min(FRAME_BYTES_MAX));
                    let frame = Frame { packed, lane, more: !rest.is_empty() };
                    if frames.send(frame).await.is_err() {
                        return;
                    }
                }
            });
            Ok(())
        })
    }
}

#[derive(Debug)]
struct GrpcReceiver {
    incoming: Streaming<Frame>,
    partial: HashMap<u32, BytesMut>,
    partial_bytes: usize,
}

impl AnswerReceiver for GrpcReceiver {
    fn receive(&mut self) -> LocalFuture<'_, Result<Bytes, LinkError>> {
        Box::pin(async move {
            loop {
                let frame = match self.incoming.message().await {
                    Ok(Some(frame)) => frame,
                    Ok(None) => return Err(LinkError("the store closed the stream".into())),
                    Err(status) => return Err(LinkError(format!("{}: {}", status.code(), status.message()))),
                };
                if frame.lane == 0 {
                    return Ok(frame.packed);
                }
                self.partial_bytes += frame.packed.len();
                if self.partial_bytes > PIECES_BYTES_MAX {
                    return Err(LinkError("the store sent more pieces than may be in flight".into()));
                }
                let whole = self.partial.entry(frame.lane).or_default();
                whole.extend_from_slice(&frame.packed);
                if !frame.more {
                    let whole = self.partial.remove(&frame.lane).unwrap_or_default().freeze();
                    self.partial_bytes -= whole.len();
                    return Ok(whole);
                }
            }
        })
    }
}
