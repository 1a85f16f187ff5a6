//! What a command that the gateway answers sees, and what it may ask for.

use crate::routing::Routing;
use crate::session::Session;
use crate::shared::Shared;
use crate::upstream::masters::Change;
use std::time::Duration;
use vasto_proto::command::ReplyWriter;
use vasto_proto::command::table::StoreCommand;
use vasto_proto::error::CommandError;
use vasto_proto::id::ShardKey;

/// What a handler sees: its connection's session, what all workers share, and the topology.
#[derive(Debug)]
pub struct Context<'a> {
    pub session: &'a mut Session,
    pub shared: &'a Shared,
    pub routing: &'a Routing,
    pub reply: &'a mut Vec<u8>,
}

impl Context<'_> {
    /// Writes the reply in its packed form.
    pub fn reply(&mut self) -> ReplyWriter<'_> {
        ReplyWriter::new(self.reply)
    }
}

/// What happens after a handler.
#[derive(Debug)]
pub enum Next {
    /// The reply is written.
    Replied,
    /// The reply is written; the connection closes when it has left.
    RepliedThenClose,
    /// Nothing is answered.
    Silent,
    /// Shards are asked first; until the reply is known the connection's later commands wait.
    Ask(Box<dyn Ask>),
    /// The master is asked for a change first; its packed answer is the one answer of the first round.
    AskMaster(Change, Box<dyn Ask>),
    /// The reply is written; it leaves, and later commands run, after this time.
    RepliedAfter(Duration),
    /// The process stops; nothing is answered.
    Shutdown,
}

/// One operation on one shard, asked for by an [`Ask`].
#[derive(Clone, Debug)]
pub struct ShardRequest {
    pub target: ShardKey,
    pub command: StoreCommand,
    pub arguments: Vec<Vec<u8>>,
}

/// A command that needs answers of shards, or of the master, in one or more rounds: a pure state machine that the dispatcher drives.
pub trait Ask: std::fmt::Debug {
    /// The operations of the first round. With none, `next` is called at once. Not called when the master is asked first.
    fn start(&mut self, context: &mut Context<'_>) -> Result<Vec<ShardRequest>, CommandError>;

    /// Takes the packed replies of the round, in the order of its requests (an operation that failed on its way is an error reply), and
    /// either asks for another round or has written the reply to `context`.
    fn next(&mut self, context: &mut Context<'_>, answers: Vec<Vec<u8>>) -> Result<Round, CommandError>;

    /// The operations of the round under way anew: the number of shards has changed since it was planned, and some of it was refused. What
    /// was `answered` of it does not come to `next`.
    fn again(&mut self, context: &mut Context<'_>, answered: &[Option<Vec<u8>>]) -> Result<Round, CommandError> {
        let _ = answered;
        self.start(context).map(Round::Again)
    }
}

/// What an [`Ask`] wants after a round.
#[derive(Debug)]
pub enum Round {
    Again(Vec<ShardRequest>),
    /// Another round after a pause; where nothing may wait (in a transaction) this packed reply is the answer instead.
    Later {
        pause: Duration,
        requests: Vec<ShardRequest>,
        otherwise: Vec<u8>,
    },
    Done,
}
