//! What shards and their stores say of themselves, added up by keyspace and by store.

use super::{Context, ShardRequest};
use vasto_proto::command::Reply;
use vasto_proto::command::table::StoreCommand;
use vasto_proto::id::{KeyspaceId, StoreId};

/// Figures that a store says of itself, whichever of its shards is asked.
const OF_STORE: &str = "store_";

/// Whether shards are to count their rows for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Walk {
    CountKeys,
    NoKeys,
}

/// What the shards of one keyspace answered, added up.
#[derive(Debug)]
pub struct KeyspaceFigures {
    pub id: KeyspaceId,
    pub name: String,
    pub shards: usize,
    pub unreachable: usize,
    /// Shards with writes that are promised a sync and wait for it.
    pub unsynced: usize,
    /// Every shard that answered has counted its keys.
    pub keys_exact: bool,
    /// Sums by name, in the order in which the stores name them.
    sums: Vec<(String, i64)>,
}

impl KeyspaceFigures {
    pub fn sum(&self, name: &str) -> i64 {
        self.sums.iter().find(|(known, _)| known == name).map_or(0, |(_, sum)| *sum)
    }

    /// Mean time to live of the keys that expire, in milliseconds.
    pub fn avg_ttl(&self) -> i64 {
        self.sum("avg_ttl").checked_div(self.sum("expires")).unwrap_or(0)
    }

    /// Name and sum of everything that can be added up.
    pub fn sums(&self) -> impl Iterator<Item = (&str, i64)> {
        let sums = self.sums.iter().map(|(name, sum)| (name.as_str(), *sum));
        sums.filter(|(name, _)| *name != "avg_ttl")
    }

    fn add(&mut self, figures: Vec<(String, i64)>) {
        let keys_expiring = figures.iter().find(|(name, _)| name == "expires").map_or(0, |(_, count)| *count);
        for (name, value) in figures {
            let value = match name.as_str() {
                "keys_exact" => {
                    self.keys_exact &= value != 0;
                    continue;
                }
                // A mean; weighted by the keys that it is the mean of.
                "avg_ttl" => value.saturating_mul(keys_expiring),
                _ => value,
            };
            self.unsynced += usize::from(name == "unsynced_ms" && value > 0);
            match self.sums.iter_mut().find(|(known, _)| *known == name) {
                // Ages: the oldest counts.
                Some((name, sum)) if name == "unsynced_ms" => *sum = value.max(*sum),
                Some((_, sum)) => *sum = sum.saturating_add(value),
                None => self.sums.push((name, value)),
            }
        }
    }
}

/// The figures of all keyspaces and of the stores that serve them; a shard that fails is counted.
#[derive(Debug, Default)]
pub struct Figures {
    pub keyspaces: Vec<KeyspaceFigures>,
    stores: Vec<(StoreId, Vec<(String, i64)>)>,
    /// Place in `keyspaces` and store of each request.
    asked: Vec<(usize, StoreId)>,
}

impl Figures {
    /// Figures to be filled in, and the questions for them.
    pub fn ask(context: &Context<'_>, walk: Walk) -> (Self, Vec<ShardRequest>) {
        let mut figures = Self::default();
        let mut requests = Vec::new();
        let arguments = match walk {
            Walk::CountKeys => Vec::new(),
            Walk::NoKeys => vec![b"NOKEYS".to_vec()],
        };
        for record in &context.routing.snapshot.keyspaces {
            let Some(routes) = context.routing.keyspace(record.id) else {
                continue;
            };
            let mut unreachable = 0;
            for target in routes.shard_keys() {
                let Some((store, _)) = routes.owner(target.shard) else {
                    // Between two primaries: nobody is asked, and nothing waits.
                    unreachable += 1;
                    continue;
                };
                figures.asked.push((figures.keyspaces.len(), store));
                let arguments = arguments.clone();
                requests.push(ShardRequest { target, command: StoreCommand::InternalStats, arguments });
            }
            figures.keyspaces.push(KeyspaceFigures {
                id: record.id,
                name: record.name.clone(),
                shards: usize::from(routes.shard_count()),
                unreachable,
                unsynced: 0,
                sums: Vec::new(),
                keys_exact: true,
            });
        }
        (figures, requests)
    }

    /// Takes the answers to all questions, in their order.
    pub fn take(&mut self, answers: &[Vec<u8>]) {
        for ((place, store), answer) in self.asked.iter().zip(answers) {
            let Some(figures) = shard_figures(answer) else {
                self.keyspaces[*place].unreachable += 1;
                continue;
            };
            let (of_store, of_shard) = figures.into_iter().partition(|(name, _)| name.starts_with(OF_STORE));
            // Said anew with each shard: the last time counts.
            self.stores.retain(|(known, _)| known != store);
            self.stores.push((*store, of_store));
            self.keyspaces[*place].add(of_shard);
        }
    }

    /// The sum over all keyspaces.
    pub fn sum(&self, name: &str) -> i64 {
        self.keyspaces.iter().map(|keyspace| keyspace.sum(name)).fold(0, i64::saturating_add)
    }

    /// The sum over all stores that answered, of a figure without its `store_`.
    pub fn sum_of_stores(&self, name: &str) -> i64 {
        let figures = self.stores.iter().flat_map(|(_, figures)| figures);
        let named = figures.filter(|(known, _)| known.strip_prefix(OF_STORE) == Some(name));
        named.map(|(_, value)| *value).fold(0, i64::saturating_add)
    }

    pub fn shards(&self) -> usize {
        self.keyspaces.iter().map(|keyspace| keyspace.shards).sum()
    }

    pub fn unreachable(&self) -> usize {
        self.keyspaces.iter().map(|keyspace| keyspace.unreachable).sum()
    }
}

/// Names and numbers of `_stats`: an array with one map.
fn shard_figures(mut answer: &[u8]) -> Option<Vec<(String, i64)>> {
    let Reply::Array(1) = Reply::take(&mut answer)? else {
        return None;
    };
    let Reply::Map(count) = Reply::take(&mut answer)? else {
        return None;
    };
    let figure = |_| match (Reply::take(&mut answer)?, Reply::take(&mut answer)?) {
        (Reply::Bulk(name), Reply::Integer(value)) => Some((String::from_utf8_lossy(name).into_owned(), value)),
        _ => None,
    };
    (0..count).map(figure).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::harness::{Harness, packed};

    #[test]
    fn sums_are_taken_over_shards_and_what_a_store_says_of_itself_counts_once() {
        let mut harness = Harness::new();
        let mut reply = Vec::new();
        let (mut figures, requests) = Figures::ask(&harness.context(&mut reply), Walk::NoKeys);
        // Keyspace 0 has three shards on two stores, `users` one on the second.
        assert_eq!(requests.len(), 4);
        assert!(requests.iter().all(|request| request.arguments == [b"NOKEYS".to_vec()]));
        let answers: Vec<Vec<u8>> = (1..=4)
            .map(|number| {
                packed(|reply| {
                    reply.array(1);
                    reply.map(3);
                    for (name, value) in [("disk_bytes", 10), ("unsynced_ms", 7 * (number - 1)), ("store_cache", 100)] {
                        reply.bulk(name.as_bytes());
                        reply.integer(value);
                    }
                })
            })
            .collect();
        figures.take(&answers);
        assert_eq!((figures.sum("disk_bytes"), figures.sum_of_stores("cache")), (40, 200));
        assert_eq!((figures.keyspaces[0].sum("unsynced_ms"), figures.keyspaces[0].unsynced), (14, 2));
        assert_eq!((figures.shards(), figures.unreachable()), (4, 0));
        let (mut figures, _) = Figures::ask(&harness.context(&mut reply), Walk::CountKeys);
        figures.take(&[answers[0].clone(), packed(|reply| reply.error("CLUSTERDOWN x"))]);
        assert_eq!((figures.sum("disk_bytes"), figures.unreachable()), (10, 1));
    }
}
