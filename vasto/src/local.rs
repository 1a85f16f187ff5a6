//! The way from a gateway's worker to a store in the same process: a call on the worker's own thread.
//!
//! What can be answered from memory is answered within `send`; answers that had to wait for the disk or a sync join the
//! others on their way back. Everything else is as with a store in another process.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

use bytes::Bytes;
use tokio::sync::Notify;
use vasto_gateway::upstream::link::LinkHalves;
use vasto_gateway::upstream::{AnswerReceiver, BatchSender, Connector, LinkError, LocalFuture};
use vasto_proto::id::{ClusterId, StoreId};
use vasto_store::{LateAnswers, Session, StoreHandle};

/// Batches of answers that the gateway has not taken: it takes them in the same turn, so this is reached only by one that
/// does not read, which then waits with its next batch.
const READY_BATCHES_MAX: usize = 64;

/// Answers are gathered in a buffer of this size at first; a batch of 64 small replies takes about as much.
const ANSWERS_BYTES_FIRST: usize = 4 << 10;

/// Opens sessions of the stores in this process.
pub struct LocalConnector {
    stores: HashMap<StoreId, StoreHandle>,
}

impl LocalConnector {
    pub fn new(stores: &[StoreHandle]) -> Self {
        Self { stores: stores.iter().map(|store| (store.id(), store.clone())).collect() }
    }
}

impl Connector for LocalConnector {
    fn connect(
        &self,
        store: StoreId,
        _address: &str,
        _cluster: ClusterId,
    ) -> LocalFuture<'static, Result<LinkHalves, LinkError>> {
        let opened = self.stores.get(&store).map(StoreHandle::open_session);
        Box::pin(async move {
            let (session, late) = opened.ok_or_else(|| LinkError(format!("store {store} is not in this process")))?;
            let ready = Rc::new(Ready::default());
            let sender = LocalSender { session, ready: Rc::clone(&ready) };
            let receiver = LocalReceiver { late, ready };
            Ok((Box::new(sender) as Box<dyn BatchSender>, Box::new(receiver) as Box<dyn AnswerReceiver>))
        })
    }
}

/// Answers on their way from the sending half to the receiving one, on one thread.
#[derive(Default)]
struct Ready {
    answers: RefCell<VecDeque<Bytes>>,
    filled: Notify,
    taken: Notify,
}

struct LocalSender {
    session: Session,
    ready: Rc<Ready>,
}

impl BatchSender for LocalSender {
    fn send(&mut self, batch: Bytes) -> LocalFuture<'_, Result<(), LinkError>> {
        Box::pin(async move {
            while self.ready.answers.borrow().len() >= READY_BATCHES_MAX {
                self.ready.taken.notified().await;
            }
            self.session.admit().await;
            let mut answers = Vec::with_capacity(ANSWERS_BYTES_FIRST);
            self.session.execute(batch, &mut answers);
            if !answers.is_empty() {
                self.ready.answers.borrow_mut().push_back(answers.into());
                self.ready.filled.notify_one();
            }
            Ok(())
        })
    }
}

struct LocalReceiver {
    late: LateAnswers,
    ready: Rc<Ready>,
}

impl AnswerReceiver for LocalReceiver {
    fn receive(&mut self) -> LocalFuture<'_, Result<Bytes, LinkError>> {
        Box::pin(async move {
            loop {
                if let Some(answers) = self.ready.answers.borrow_mut().pop_front() {
                    self.ready.taken.notify_one();
                    return Ok(answers);
                }
                // Both are cancel safe: a permit of `notify_one` is kept, late answers are taken out when they are returned.
                tokio::select! {
                    biased;
                    () = self.ready.filled.notified() => {}
                    late = self.late.next() => {
                        return late.map(Bytes::from).ok_or_else(|| LinkError("the session is closed".to_owned()));
                    }
                }
            }
        })
    }
}
