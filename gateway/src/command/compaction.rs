//! KEYSPACE COMPACT: asks every shard of a keyspace to rewrite its files without its dead rows, and answers when all have.

use super::topology::named_keyspace;
use super::{Ask, Context, Next, Round, ShardRequest};
use vasto_proto::command::table::StoreCommand;
use vasto_proto::command::{Args, Reply};
use vasto_proto::error::{self, CommandError};
use vasto_proto::id::KeyspaceId;

pub fn keyspace_compact(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let keyspace = named_keyspace(&context.routing.snapshot, args.bytes()?)?.id;
    Ok(Next::Ask(Box::new(Compact { keyspace })))
}

#[derive(Debug)]
struct Compact {
    keyspace: KeyspaceId,
}

impl Ask for Compact {
    fn start(&mut self, context: &mut Context<'_>) -> Result<Vec<ShardRequest>, CommandError> {
        let routes = context.routing.keyspace(self.keyspace).ok_or(error::NO_KEYSPACE)?;
        let request = |target| ShardRequest { target, command: StoreCommand::InternalCompact, arguments: Vec::new() };
        Ok(routes.shard_keys().map(request).collect())
    }

    fn next(&mut self, context: &mut Context<'_>, answers: Vec<Vec<u8>>) -> Result<Round, CommandError> {
        for answer in &answers {
            if let Some(Reply::Error(text)) = Reply::take(&mut answer.as_slice()) {
                return Err(String::from_utf8_lossy(text).into_owned().into());
            }
        }
        context.reply().ok();
        Ok(Round::Done)
    }
}

#[cfg(test)]
mod tests {
    use crate::command::harness::{Harness, packed};
    use vasto_proto::command::table::StoreCommand;

    #[test]
    fn every_shard_is_asked_and_one_that_fails_is_no_success() {
        let mut harness = Harness::new();
        assert_eq!(harness.run("KEYSPACE COMPACT nosuch"), "-ERR no such keyspace 'nosuch'");
        let mut asked = Vec::new();
        let reply = harness.run_with("KEYSPACE COMPACT 0", &mut |request| {
            assert_eq!(request.command, StoreCommand::InternalCompact);
            asked.push(request.target.shard.0);
            packed(|reply| reply.ok())
        });
        assert_eq!((reply.as_str(), asked.as_slice()), ("OK", &[0, 1, 2][..]));
        let reply = harness.run_with("KEYSPACE COMPACT 0", &mut |request| {
            packed(|reply| if request.target.shard.0 == 1 { reply.error("CLUSTERDOWN x") } else { reply.ok() })
        });
        assert_eq!(reply, "-CLUSTERDOWN x");
    }
}
