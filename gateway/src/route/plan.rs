//! Finds the shards of a command.

use crate::resp::scanner::CommandLine;
use crate::routing::{KeyspaceRoutes, Routing};
use vasto_proto::command::{CommandSpec, Merge, Route};
use vasto_proto::error::{self, CommandError};
use vasto_proto::id::ShardKey;

/// Where a command goes.
#[derive(Debug, PartialEq, Eq)]
pub enum Plan {
    /// All of it to one shard.
    One(ShardKey),
    /// A share to each of several shards.
    Many { parts: Vec<Part>, merge: Merge },
}

/// The share of one shard.
#[derive(Debug, PartialEq, Eq)]
pub struct Part {
    pub target: ShardKey,
    /// Which key groups (a key and what belongs to it, counted from 0) go there; `None`: the whole command line.
    pub groups: Option<Vec<u32>>,
}

/// The words of a command, its name among them.
pub trait Words {
    fn count(&self) -> usize;
    fn at(&self, place: usize) -> &[u8];
}

/// As a client sent it.
impl Words for CommandLine<'_> {
    fn count(&self) -> usize {
        self.len()
    }

    fn at(&self, place: usize) -> &[u8] {
        self.word(place)
    }
}

/// Of an operation that comes back: its name and its arguments, which may be only a share of what the client sent.
impl Words for Vec<&[u8]> {
    fn count(&self) -> usize {
        self.len()
    }

    fn at(&self, place: usize) -> &[u8] {
        self[place]
    }
}

/// Plans a command that shards execute, or what is left of one. `keyspace` is the connection's.
pub fn plan(
    spec: &CommandSpec,
    line: &impl Words,
    keyspace: &KeyspaceRoutes,
    routing: &Routing,
) -> Result<Plan, CommandError> {
    // A key without its value is answered as the shard would, but before anything is split.
    let step = usize::from(spec.keys.step.unsigned_abs()).max(1);
    if spec.keys.last < 0 && !(line.count() - spec.keys.first as usize).is_multiple_of(step) {
        return Err(error::wrong_arity(spec.name));
    }
    match spec.route {
        Route::OneShard => one_shard(spec, line, keyspace),
        Route::Split(merge) => split(spec, line, keyspace, merge),
        Route::AllShards(merge) => Ok(everywhere(keyspace.shard_keys(), merge)),
        Route::AllKeyspaces(merge) => {
            Ok(everywhere(routing.keyspaces().flat_map(|keyspace| keyspace.shard_keys()), merge))
        }
        Route::Here => unreachable!("the dispatcher answers {} itself", spec.name),
    }
}

fn one_shard(spec: &CommandSpec, line: &impl Words, keyspace: &KeyspaceRoutes) -> Result<Plan, CommandError> {
    // Positions count the name as one word; a subcommand's line carries both words, as in Redis.
    let mut positions = spec.key_positions(line.count());
    let first = positions.next().map_or(line.at(0), |position| line.at(position));
    let shard = keyspace.shard_of_key(first);
    if positions.any(|position| keyspace.shard_of_key(line.at(position)) != shard) {
        return Err(error::CROSS_SHARD);
    }
    Ok(Plan::One(keyspace.shard_key(shard)))
}

fn split(spec: &CommandSpec, line: &impl Words, keyspace: &KeyspaceRoutes, merge: Merge) -> Result<Plan, CommandError> {
    if keyspace.shard_count() == 1 {
        return Ok(Plan::One(keyspace.shard_keys().next().expect("a keyspace has a shard")));
    }
    let words = spec.words_before_event_time(line.count(), |place| line.at(place));
    // The share of a shard is a list of keys alone: an event time travels with the whole line, to the shard of its one key.
    if words < line.count() && spec.key_positions(words).nth(1).is_some() {
        return Err(error::EVENT_TIME_OF_SEVERAL);
    }
    let mut parts: Vec<Part> = Vec::new();
    for (group, position) in spec.key_positions(words).enumerate() {
        let target = keyspace.shard_key(keyspace.shard_of_key(line.at(position)));
        let part = match parts.iter().position(|part| part.target == target) {
            Some(index) => &mut parts[index],
            None => {
                parts.push(Part { target, groups: Some(Vec::new()) });
                parts.last_mut().expect("just pushed")
            }
        };
        part.groups.as_mut().expect("shares of a split have groups").push(group as u32);
    }
    Ok(match parts.as_slice() {
        [only] => Plan::One(only.target),
        _ => Plan::Many { parts, merge },
    })
}

fn everywhere(targets: impl Iterator<Item = ShardKey>, merge: Merge) -> Plan {
    let parts: Vec<Part> = targets.map(|target| Part { target, groups: None }).collect();
    match parts.as_slice() {
        [only] => Plan::One(only.target),
        _ => Plan::Many { parts, merge },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resp::scanner::Scanner;
    use std::sync::Arc;
    use vasto_proto::command::table;
    use vasto_proto::id::{KeyspaceId, StoreId};
    use vasto_proto::topology::{KeyspaceRecord, Snapshot};

    fn plan_of(text: &str, shard_count: usize) -> Result<Plan, CommandError> {
        let stores: Vec<StoreId> = (1..=shard_count as u32).map(StoreId).collect();
        let record = KeyspaceRecord::new(KeyspaceId(0), "0", &stores).unwrap();
        let routing = Routing::new(Arc::new(Snapshot { keyspaces: vec![record], ..Snapshot::default() }));
        let input = format!("{text}\r\n");
        let mut scanner = Scanner::default();
        scanner.scan(input.as_bytes(), 1 << 20);
        let line = scanner.line(input.as_bytes());
        let mut command = table::find(line.word(0)).unwrap();
        if command.spec().flags.contains(vasto_proto::command::Flags::CONTAINER) {
            command = table::find_subcommand(command.spec(), line.word(1)).unwrap();
        }
        plan(command.spec(), &line, routing.keyspace(KeyspaceId(0)).unwrap(), &routing)
    }

    fn groups(plan: Plan) -> Vec<Vec<u32>> {
        match plan {
            Plan::One(_) => Vec::new(),
            Plan::Many { parts, .. } => parts.into_iter().map(|part| part.groups.unwrap_or_default()).collect(),
        }
    }

    #[test]
    fn one_shard_takes_everything_whole() {
        for text in ["GET a", "MSET a 1 b 2", "DEL a b c", "DBSIZE", "RENAME a b", "OBJECT ENCODING a"] {
            assert!(matches!(plan_of(text, 1), Ok(Plan::One(_))), "{text}");
        }
    }

    #[test]
    fn keys_are_split_by_shard_and_keep_their_places() {
        let mut shares = groups(plan_of("MSET a 1 b 2 c 3 d 4 e 5 f 6", 3).unwrap());
        assert!(shares.len() > 1);
        assert!(shares.iter().all(|share| share.is_sorted()));
        let mut all = shares.concat();
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3, 4, 5]);
        shares = groups(plan_of("DBSIZE", 5).unwrap());
        assert_eq!(shares.len(), 5);
    }

    #[test]
    fn a_key_without_its_value_is_refused() {
        for text in ["MSET a 1 b", "MSETNX a 1 b 2 c"] {
            assert!(plan_of(text, 3).is_err_and(|error| error.text().contains("wrong number of arguments")), "{text}");
        }
    }

    #[test]
    fn an_event_time_goes_to_the_shard_of_its_key() {
        let shard = plan_of("GET a", 7).unwrap();
        assert_eq!(plan_of("DEL a EVENTTIME 5", 7), Ok(shard));
        assert!(matches!(plan_of("SETEX a 1 v EVENTTIME 5", 7), Ok(Plan::One(_))));
        assert_eq!(plan_of("UNLINK {a}1 {a}2 EVENTTIME 5", 7), Err(error::EVENT_TIME_OF_SEVERAL));
        assert_eq!(groups(plan_of("DEL a EVENTTIME b", 7).unwrap()).concat().len(), 3);
    }

    #[test]
    fn keys_of_one_tag_stay_together_and_others_are_refused() {
        assert!(matches!(plan_of("RENAME {t}a {t}b", 7), Ok(Plan::One(_))));
        assert!(matches!(plan_of("MGET {t}a {t}b {t}c", 7), Ok(Plan::One(_))));
        let cross = (0..50).filter(|key| plan_of(&format!("RENAME a k{key}"), 7) == Err(error::CROSS_SHARD)).count();
        assert!(cross > 30, "{cross} of 50 pairs lie in different shards");
    }
}
