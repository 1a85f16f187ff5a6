//! What the gateway remembers of one client connection between its commands.

use crate::clients::ClientRecord;
use std::sync::Arc;
use vasto_proto::command::table::Command;
use vasto_proto::id::{KeyspaceId, ShardKey};

/// RESP version of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    #[default]
    Resp2,
    Resp3,
}

/// CLIENT REPLY.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReplyMode {
    #[default]
    On,
    Off,
    /// The reply of the next command is left out.
    SkipNext,
    /// The reply of the command that runs now is left out.
    SkipThis,
}

/// A command of a transaction, with its arguments packed as `batch::Arguments` reads them.
#[derive(Clone, Debug)]
pub struct QueuedCommand {
    pub command: Command,
    pub argument_count: u32,
    pub packed_arguments: Vec<u8>,
}

/// Between MULTI and EXEC.
#[derive(Clone, Debug, Default)]
pub struct Transaction {
    pub commands: Vec<QueuedCommand>,
    /// A command was refused while queueing: EXEC will answer EXECABORT.
    pub is_broken: bool,
}

/// A watched key and its token when it was watched.
#[derive(Clone, Debug)]
pub struct WatchedKey {
    pub target: ShardKey,
    pub key: Vec<u8>,
    pub token: Vec<u8>,
}

/// The state of one client connection.
#[derive(Debug)]
pub struct Session {
    pub protocol: Protocol,
    pub keyspace: KeyspaceId,
    pub reply_mode: ReplyMode,
    pub transaction: Option<Transaction>,
    pub watched: Vec<WatchedKey>,
    /// What other workers see of it (CLIENT LIST, CLIENT KILL).
    pub client: Arc<ClientRecord>,
}

impl Session {
    pub fn new(client: Arc<ClientRecord>) -> Self {
        Self {
            protocol: Protocol::default(),
            keyspace: KeyspaceId(0),
            reply_mode: ReplyMode::default(),
            transaction: None,
            watched: Vec::new(),
            client,
        }
    }
}
