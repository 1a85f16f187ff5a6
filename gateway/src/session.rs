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
    pub keyspace: KeyspaceId,
    pub key: Vec<u8>,
    pub token: Vec<u8>,
}

/// The shards that a connection has sent writes to, for WAIT.
#[derive(Clone, Debug, Default)]
pub struct WrittenShards {
    /// The one of the last write, and of how many: most connections write to one keyspace, many to one shard.
    last: Option<(ShardKey, u16)>,
    keyspaces: Vec<WrittenKeyspace>,
}

#[derive(Clone, Debug)]
struct WrittenKeyspace {
    keyspace: KeyspaceId,
    /// By how many shards slots were assigned when it was last written to.
    shard_count: u16,
    /// One bit a shard, in words of 64.
    words: Vec<u64>,
}

impl WrittenShards {
    /// A write goes to a shard, of so many by which slots are assigned.
    pub fn note(&mut self, shard: ShardKey, shard_count: u16) {
        if self.last == Some((shard, shard_count)) {
            return;
        }
        self.last = Some((shard, shard_count));
        let place = match self.keyspaces.iter().position(|known| known.keyspace == shard.keyspace) {
            Some(place) => place,
            None => {
                self.keyspaces.push(WrittenKeyspace { keyspace: shard.keyspace, shard_count, words: Vec::new() });
                self.keyspaces.len() - 1
            }
        };
        let known = &mut self.keyspaces[place];
        let (word, bit) = (usize::from(shard.shard.0 / 64), shard.shard.0 % 64);
        if known.shard_count != shard_count {
            // What was written before lies in whichever shards have its slots now.
            known.shard_count = shard_count;
            known.words = vec![u64::MAX; usize::from(shard_count.div_ceil(64))];
        }
        if known.words.len() <= word {
            known.words.resize(word + 1, 0);
        }
        known.words[word] |= 1 << bit;
    }

    /// The shards that may have writes of the connection, by how many shards each keyspace has now; none of one that has none.
    pub fn shards(&self, shard_count: impl Fn(KeyspaceId) -> Option<u16>) -> Vec<ShardKey> {
        let mut written = Vec::new();
        for known in &self.keyspaces {
            let Some(count) = shard_count(known.keyspace) else { continue };
            let may_have = |shard: &u16| {
                let word = known.words.get(usize::from(shard / 64)).copied().unwrap_or(0);
                count != known.shard_count || word >> (shard % 64) & 1 == 1
            };
            let shards = (0..count).filter(may_have).map(ShardId);
            written.extend(shards.map(|shard| ShardKey { keyspace: known.keyspace, shard }));
        }
        written
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
        let count = |keyspace: KeyspaceId| Some(if keyspace.0 == 0 { 70 } else { 1024 });
        assert_eq!(written.shards(count), []);
        for shard in [key(0, 1), key(0, 1), key(7, 1023), key(0, 64), key(0, 1), key(7, 0)] {
            written.note(shard, count(shard.keyspace).unwrap());
        }
        assert_eq!(written.shards(count), [key(0, 1), key(0, 64), key(7, 0), key(7, 1023)]);
        assert_eq!(written.shards(|keyspace| count(keyspace).filter(|_| keyspace.0 == 0)), [key(0, 1), key(0, 64)]);
    }

    #[test]
    fn what_was_written_before_the_number_of_shards_changed_may_lie_in_each() {
        let key = |shard| ShardKey { keyspace: KeyspaceId(0), shard: ShardId(shard) };
        let mut written = WrittenShards::default();
        written.note(key(1), 3);
        assert_eq!(written.shards(|_| Some(2)), [key(0), key(1)]);
        written.note(key(1), 2);
        assert_eq!(written.shards(|_| Some(2)), [key(0), key(1)]);
    }
}
