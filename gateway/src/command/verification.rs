//! KEYSPACE VERIFY: has the copies of every shard of a keyspace compared, one shard after the other, and tells what came of it.

use super::topology::named_keyspace;
use super::{Ask, Context, Next, Round, ShardRequest};
use vasto_proto::command::table::StoreCommand;
use vasto_proto::command::{Args, Reply, ReplyWriter};
use vasto_proto::error::{self, CommandError};
use vasto_proto::id::{KeyspaceId, ShardKey};

/// shard, rows, copies, slots_differing, text.
const FIELDS: usize = 5;

pub fn keyspace_verify(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let keyspace = named_keyspace(&context.routing.snapshot, args.bytes()?)?.id;
    Ok(Next::Ask(Box::new(Verify { keyspace, asked: Vec::new(), answers: Vec::new() })))
}

#[derive(Debug)]
struct Verify {
    keyspace: KeyspaceId,
    asked: Vec<ShardKey>,
    /// Of the first shards that were asked.
    answers: Vec<Vec<u8>>,
}

/// Walks of all shards at once would take the threads that wait for the disk.
fn request(target: ShardKey) -> ShardRequest {
    ShardRequest { target, command: StoreCommand::InternalVerify, arguments: Vec::new() }
}

impl Ask for Verify {
    fn start(&mut self, context: &mut Context<'_>) -> Result<Vec<ShardRequest>, CommandError> {
        let routes = context.routing.keyspace(self.keyspace).ok_or(error::NO_KEYSPACE)?;
        self.asked = routes.shard_keys().collect();
        // Of another number of shards, when it is asked again.
        self.answers.clear();
        Ok(self.asked.first().map(|key| request(*key)).into_iter().collect())
    }

    fn next(&mut self, context: &mut Context<'_>, answers: Vec<Vec<u8>>) -> Result<Round, CommandError> {
        self.answers.extend(answers);
        if let Some(key) = self.asked.get(self.answers.len()) {
            return Ok(Round::Again(vec![request(*key)]));
        }
        let mut reply = context.reply();
        reply.array(self.asked.len());
        for (key, answer) in self.asked.iter().zip(&self.answers) {
            reply.map(FIELDS);
            reply.bulk(b"shard");
            reply.integer(i64::from(key.shard.0));
            write_answer(&mut reply, answer);
        }
        Ok(Round::Done)
    }
}

/// A shard that cannot be asked does not hide what the others say.
fn write_answer(reply: &mut ReplyWriter<'_>, mut answer: &[u8]) {
    let mut numbers = [None; 3];
    let mut text: &[u8] = b"the answer is malformed";
    match Reply::take(&mut answer) {
        Some(Reply::Array(4)) => {
            for number in &mut numbers {
                if let Some(Reply::Integer(value)) = Reply::take(&mut answer) {
                    *number = Some(value);
                }
            }
            if let Some(Reply::Bulk(said)) = Reply::take(&mut answer) {
                text = said;
            }
        }
        Some(Reply::Error(error)) => text = error,
        Some(_) | None => {}
    }
    for (name, number) in ["rows", "copies", "slots_differing"].into_iter().zip(numbers) {
        reply.bulk(name.as_bytes());
        match number {
            Some(number) => reply.integer(number),
            None => reply.null(),
        }
    }
    reply.bulk(b"text");
    reply.bulk(text);
}

#[cfg(test)]
mod tests {
    use crate::command::harness::{Harness, packed};
    use vasto_proto::command::table::StoreCommand;

    #[test]
    fn one_shard_is_asked_after_the_other_and_one_that_fails_hides_nothing() {
        let mut harness = Harness::new();
        assert_eq!(harness.run("KEYSPACE VERIFY nosuch"), "-ERR no such keyspace 'nosuch'");
        let mut asked = Vec::new();
        let reply = harness.run_with("KEYSPACE VERIFY 0", &mut |request| {
            assert_eq!(request.command, StoreCommand::InternalVerify);
            asked.push(request.target.shard.0);
            packed(|reply| {
                if request.target.shard.0 == 1 {
                    return reply.error("CLUSTERDOWN x");
                }
                reply.array(4);
                [7, 1, 0].into_iter().for_each(|number| reply.integer(number));
                reply.bulk(b"");
            })
        });
        assert_eq!(asked, [0, 1, 2]);
        let shards = [
            r#"{"shard": 0, "rows": 7, "copies": 1, "slots_differing": 0, "text": ""}"#,
            r#"{"shard": 1, "rows": null, "copies": null, "slots_differing": null, "text": "CLUSTERDOWN x"}"#,
            r#"{"shard": 2, "rows": 7, "copies": 1, "slots_differing": 0, "text": ""}"#,
        ];
        assert_eq!(reply, format!("[{}]", shards.join(", ")));
    }
}
