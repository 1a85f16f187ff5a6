//! What the gateway remembers of one client connection between its commands.

use crate::clients::ClientRecord;
use std::sync::Arc;
use vasto_proto::command::table::Command;
use vasto_proto::id::{KeyspaceId, ShardId, ShardKey};

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

/// The shards that a connection has sent writes to, for WAIT.
#[derive(Clone, Debug, Default)]
pub struct WrittenShards {
    /// The one of the last write: most connections write to one keyspace, many to one shard.
    last: Option<ShardKey>,
    /// One bit a shard, in words of 64, by keyspace.
    keyspaces: Vec<(KeyspaceId, Vec<u64>)>,
}

impl WrittenShards {
    pub fn note(&mut self, shard: ShardKey) {
        if self.last == Some(shard) {
            return;
        }
        self.last = Some(shard);
        let place = match self.keyspaces.iter().position(|(keyspace, _)| *keyspace == shard.keyspace) {
            Some(place) => place,
            None => {
                self.keyspaces.push((shard.keyspace, Vec::new()));
                self.keyspaces.len() - 1
            }
        };
        let words = &mut self.keyspaces[place].1;
        let (word, bit) = (usize::from(shard.shard.0 / 64), shard.shard.0 % 64);
        if words.len() <= word {
            words.resize(word + 1, 0);
        }
        words[word] |= 1 << bit;
    }

    pub fn iter(&self) -> impl Iterator<Item = ShardKey> + '_ {
        self.keyspaces.iter().flat_map(|(keyspace, words)| {
            let written = |shard: &u16| words[usize::from(shard / 64)] >> (shard % 64) & 1 == 1;
            let shards = (0..words.len() as u16 * 64).filter(written);
            shards.map(|shard| ShardKey { keyspace: *keyspace, shard: ShardId(shard) })
        })
    }
}

/// The state of one client connection.
#[derive(Debug)]
pub struct Session {
    pub protocol: Protocol,
    pub keyspace: KeyspaceId,
    pub reply_mode: ReplyMode,
    pub transaction: Option<Transaction>,
    pub watched: Vec<WatchedKey>,
    /// READONLY: what only reads may be answered by a replica.
    pub reads_from_replicas: bool,
    pub written: WrittenShards,
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
            reads_from_replicas: false,
            written: WrittenShards::default(),
            client,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_shard_that_was_written_to_is_known_once() {
        let key = |keyspace, shard| ShardKey { keyspace: KeyspaceId(keyspace), shard: ShardId(shard) };
        let mut written = WrittenShards::default();
        assert_eq!(written.iter().count(), 0);
        for shard in [key(0, 1), key(0, 1), key(7, 1023), key(0, 64), key(0, 1), key(7, 0)] {
            written.note(shard);
        }
        assert_eq!(written.iter().collect::<Vec<_>>(), [key(0, 1), key(0, 64), key(7, 0), key(7, 1023)]);
    }
}
