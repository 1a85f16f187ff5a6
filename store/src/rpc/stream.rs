//! The answering half of one gateway's stream. It is polled only when the connection has room for more, and reads, runs and
//! answers batches inside that poll: no task, no channel, and a gateway that does not take its answers is not read from.

use super::pieces::{Assembler, Outgoing};
use crate::{LateAnswers, Session, StoreHandle};
use bytes::Bytes;
use futures_util::Stream;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{Status, Streaming};
use vasto_proto::pb::Frame;

/// Room that the answers of a batch get at first.
const ANSWERS_BYTES: usize = 4 << 10;

pub struct AnswerStream {
    incoming: Streaming<Frame>,
    /// The gateway has said its last, or the store stops.
    ended: bool,
    assembler: Assembler,
    session: Session,
    late: LateAnswers,
    outgoing: Outgoing,
    /// Bytes of the last batch's answers: the next will be about as long.
    answers_bytes: usize,
    shutdown: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl AnswerStream {
    pub fn new(handle: &StoreHandle, incoming: Streaming<Frame>, shutdown: &CancellationToken) -> Self {
        let (session, late) = handle.open_session();
        Self {
            incoming,
            ended: false,
            assembler: Assembler::new(handle.proto_max_bulk_len()),
            session,
            late,
            outgoing: Outgoing::default(),
            answers_bytes: ANSWERS_BYTES,
            shutdown: Box::pin(shutdown.clone().cancelled_owned()),
        }
    }

    fn run(&mut self, batch: &Bytes) -> Result<(), Status> {
        let mut answers = Vec::with_capacity(self.answers_bytes);
        let ran = self.session.try_execute(batch, &mut answers);
        self.answers_bytes = answers.len().clamp(ANSWERS_BYTES, 64 * ANSWERS_BYTES);
        if !answers.is_empty() {
            self.outgoing.push(answers.into());
        }
        ran.map_err(|error| Status::invalid_argument(error.to_string()))
    }
}

impl Stream for AnswerStream {
    type Item = Result<Frame, Status>;

    fn poll_next(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if let Some(frame) = this.outgoing.pop() {
                return Poll::Ready(Some(Ok(frame)));
            }
            // Asked first: answers that come after the look below would otherwise be missed at the end.
            let is_waiting = this.late.is_waiting();
            match this.late.poll_next(task) {
                Poll::Ready(Some(answers)) => {
                    this.outgoing.push(answers.into());
                    continue;
                }
                Poll::Ready(None) | Poll::Pending => {}
            }
            if this.ended {
                return if is_waiting { Poll::Pending } else { Poll::Ready(None) };
            }
            if this.session.poll_admit(task).is_pending() {
                return Poll::Pending;
            }
            match Pin::new(&mut this.incoming).poll_next(task) {
                Poll::Ready(Some(Ok(frame))) => match this.assembler.take(frame) {
                    Ok(None) => {}
                    Ok(Some(batch)) => {
                        if let Err(status) = this.run(&batch) {
                            return Poll::Ready(Some(Err(status)));
                        }
                    }
                    Err(error) => return Poll::Ready(Some(Err(Status::resource_exhausted(error.to_string())))),
                },
                Poll::Ready(Some(Err(error))) => {
                    tracing::debug!(%error, "a gateway's stream broke");
                    this.ended = true;
                }
                Poll::Ready(None) => this.ended = true,
                Poll::Pending => match this.shutdown.as_mut().poll(task) {
                    Poll::Ready(()) => this.ended = true,
                    Poll::Pending => return Poll::Pending,
                },
            }
        }
    }
}
