//! WAIT and ROLE, and what shards say of their copies.

use super::client::timeout_ms;
use super::{Ask, Context, Next, Round, ShardRequest};
use crate::routing::{KeyspaceRoutes, Routing};
use std::time::{Duration, Instant};
use vasto_proto::command::table::StoreCommand;
use vasto_proto::command::{Args, Reply, ReplyWriter};
use vasto_proto::error::{self, CommandError};
use vasto_proto::id::{ClusterId, KeyspaceId, ShardKey, StoreId};
use vasto_proto::slot::splitmix64;
use vasto_proto::topology::ShardRecord;

/// First and longest pause between two questions of a WAIT: it returns soon after the replicas have the writes, and a long one costs little.
const ASK_AGAIN_MIN: Duration = Duration::from_millis(2);
const ASK_AGAIN_MAX: Duration = Duration::from_millis(20);

/// What a primary says of one follower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Follower {
    pub store: StoreId,
    pub connected: bool,
    pub in_sync: bool,
    /// Up to where in the primary's log.
    pub applied: u64,
    pub lag: Duration,
}

/// What a primary says of its shard.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShardCopies {
    /// Epoch of the shard, and which life of its primary: sequence numbers of two of them do not compare.
    pub era: (u64, u64),
    /// The last sequence number of its log.
    pub sequence: u64,
    pub followers: Vec<Follower>,
}

impl ShardCopies {
    /// Reads the answer to `_replication`; `None` for an error, and for a store that does not lead the shard.
    pub fn parse(mut answer: &[u8]) -> Option<Self> {
        let answer = &mut answer;
        if Reply::take(answer)? != Reply::Array(5) || Reply::take(answer)? != Reply::Bulk(b"primary") {
            return None;
        }
        let era = (number(answer)?, number(answer)?);
        let sequence = number(answer)?;
        let Reply::Array(count) = Reply::take(answer)? else { return None };
        let followers = (0..count).map(|_| follower(answer)).collect::<Option<_>>()?;
        Some(Self { era, sequence, followers })
    }

    pub fn follower(&self, store: StoreId) -> Option<&Follower> {
        self.followers.iter().find(|follower| follower.store == store)
    }

    /// How many of the record's replicas follow and have applied the log up to `sequence`.
    fn count(&self, record: &ShardRecord, sequence: u64) -> usize {
        let has_it = |follower: &&Follower| {
            follower.connected && follower.applied >= sequence && record.replicas.contains(&follower.store)
        };
        self.followers.iter().filter(has_it).count()
    }

    /// How many of the record's replicas have all but what is on its way.
    pub fn in_sync(&self, record: &ShardRecord) -> usize {
        let is_in_sync =
            |follower: &&Follower| follower.connected && follower.in_sync && record.replicas.contains(&follower.store);
        self.followers.iter().filter(is_in_sync).count()
    }
}

fn number(answer: &mut &[u8]) -> Option<u64> {
    match Reply::take(answer)? {
        Reply::Integer(number) => u64::try_from(number).ok(),
        _ => None,
    }
}

fn follower(answer: &mut &[u8]) -> Option<Follower> {
    if Reply::take(answer)? != Reply::Array(5) {
        return None;
    }
    Some(Follower {
        store: StoreId(u32::try_from(number(answer)?).ok()?),
        connected: number(answer)? != 0,
        in_sync: number(answer)? != 0,
        applied: number(answer)?,
        lag: Duration::from_micros(number(answer)?),
    })
}

pub fn ask(target: ShardKey) -> ShardRequest {
    ShardRequest { target, command: StoreCommand::InternalReplication, arguments: Vec::new() }
}

/// The shards of a keyspace that have a primary to ask.
pub fn shards_to_ask(routing: &Routing, keyspace: KeyspaceId) -> Vec<ShardKey> {
    let Some(routes) = routing.keyspace(keyspace) else {
        return Vec::new();
    };
    routes.shard_keys().filter(|target| routes.owner(target.shard).is_some()).collect()
}

/// A keyspace's copies as Redis shows replicas: by the stores that hold them, with one offset for all shards together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Replicas {
    /// The sum of the sequence numbers of all primaries.
    pub offset: u64,
    pub stores: Vec<ReplicaStore>,
}

/// A store with copies that follow primaries on other stores.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaStore {
    pub store: StoreId,
    /// Of its address.
    pub ip: String,
    pub port: String,
    /// Every copy of it is a replica and has all but what is on its way.
    pub is_online: bool,
    /// Some copy of it follows.
    pub is_connected: bool,
    /// The primaries' offset without what its copies lack.
    pub offset: u64,
    /// The longest of its copies.
    pub lag: Duration,
}

impl Replicas {
    /// From what the asked shards of one keyspace answered.
    pub fn new(routing: &Routing, asked: &[(ShardKey, Option<ShardCopies>)]) -> Self {
        let offset = asked.iter().filter_map(|(_, copies)| copies.as_ref()).map(|copies| copies.sequence).sum();
        let mut stores: Vec<ReplicaStore> = Vec::new();
        for (target, copies) in asked {
            let record = routing.keyspace(target.keyspace).and_then(|routes| routes.shard(target.shard));
            let (Some(record), Some(copies)) = (record, copies) else { continue };
            for follower in &copies.followers {
                let place = match stores.iter().position(|known| known.store == follower.store) {
                    Some(place) => place,
                    None => {
                        let address = routing.snapshot.store(follower.store).map_or("", |store| &store.address);
                        let (ip, port) = address.rsplit_once(':').unwrap_or((address, "0"));
                        stores.push(ReplicaStore {
                            store: follower.store,
                            ip: ip.to_owned(),
                            port: port.to_owned(),
                            is_online: true,
                            is_connected: false,
                            offset,
                            lag: Duration::ZERO,
                        });
                        stores.len() - 1
                    }
                };
                let store = &mut stores[place];
                store.is_online &= follower.connected && follower.in_sync && record.replicas.contains(&follower.store);
                store.is_connected |= follower.connected;
                store.offset = store.offset.saturating_sub(copies.sequence.saturating_sub(follower.applied));
                store.lag = store.lag.max(follower.lag);
            }
        }
        // As in Redis: who is not connected is no replica.
        stores.retain(|store| store.is_connected);
        stores.sort_by_key(|store| store.store);
        Self { offset, stores }
    }
}

/// What Redis calls the id of a replication history: 40 hexadecimal digits, the same at every gateway.
pub fn replication_id(cluster: ClusterId) -> String {
    let (second, third) = (splitmix64(cluster.0), splitmix64(!cluster.0));
    format!("{cluster}{second:016x}{:08x}", third >> 32)
}

/// ROLE: what this gateway stands for is a master, with the keyspace's replicas.
pub fn role(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    Ok(Next::Ask(Box::new(Role { keyspace: context.session.keyspace, asked: Vec::new() })))
}

#[derive(Debug)]
struct Role {
    keyspace: KeyspaceId,
    asked: Vec<ShardKey>,
}

impl Ask for Role {
    fn start(&mut self, context: &mut Context<'_>) -> Result<Vec<ShardRequest>, CommandError> {
        self.asked = shards_to_ask(context.routing, self.keyspace);
        Ok(self.asked.iter().map(|target| ask(*target)).collect())
    }

    fn next(&mut self, context: &mut Context<'_>, answers: Vec<Vec<u8>>) -> Result<Round, CommandError> {
        let answered: Vec<_> =
            self.asked.iter().zip(&answers).map(|(target, answer)| (*target, ShardCopies::parse(answer))).collect();
        let replicas = Replicas::new(context.routing, &answered);
        let online: Vec<&ReplicaStore> = replicas.stores.iter().filter(|store| store.is_online).collect();
        let mut reply = context.reply();
        reply.array(3);
        reply.bulk(b"master");
        reply.integer(i64::try_from(replicas.offset).unwrap_or(i64::MAX));
        reply.array(online.len());
        for store in online {
            reply.array(3);
            reply.bulk(store.ip.as_bytes());
            reply.bulk(store.port.as_bytes());
            reply.bulk(store.offset.to_string().as_bytes());
        }
        Ok(Round::Done)
    }
}

/// WAIT numreplicas timeout: how many replicas have the writes that this connection has made so far, the least over their shards.
pub fn wait(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let replicas = args.integer()?;
    let timeout_ms = timeout_ms(args.bytes()?)?;
    let until = (timeout_ms > 0).then(|| Instant::now().checked_add(Duration::from_millis(timeout_ms))).flatten();
    // A keyspace that was dropped has no copies to wait for.
    let written = context.session.written.shards(|keyspace| Some(context.routing.keyspace(keyspace)?.shard_count()));
    let mut goals: Vec<Goal> = Vec::new();
    for target in written {
        let routes = context.routing.keyspace(target.keyspace).ok_or(error::NO_KEYSPACE)?;
        goals.push(Goal { target, shard_count: routes.shard_count(), reached_at: None });
    }
    if goals.is_empty() {
        let routes = context.routing.keyspace(context.session.keyspace);
        goals.extend(routes.into_iter().flat_map(|routes| Goal::of_all(routes, NOTHING_WRITTEN)));
    }
    Ok(Next::Ask(Box::new(Wait { replicas, until, goals, asked: Vec::new(), pause: ASK_AGAIN_MIN })))
}

/// Era and sequence number of a primary.
type LogPosition = ((u64, u64), u64);

/// Every replica has all of it.
const NOTHING_WRITTEN: Option<LogPosition> = Some(((0, 0), 0));

#[derive(Debug)]
struct Goal {
    target: ShardKey,
    /// By how many shards slots were assigned when it was set.
    shard_count: u16,
    /// The era in which the primary was asked first, and the end of its log then: the connection's writes are below it. 0 is reached in
    /// any era.
    reached_at: Option<LogPosition>,
}

impl Goal {
    /// In every shard of a keyspace.
    fn of_all(routes: &KeyspaceRoutes, reached_at: Option<LogPosition>) -> Vec<Self> {
        let shard_count = routes.shard_count();
        routes.shard_keys().map(|target| Self { target, shard_count, reached_at }).collect()
    }

    fn count(&mut self, record: &ShardRecord, copies: &ShardCopies) -> usize {
        let (_, sequence) = match self.reached_at {
            Some((era, sequence)) if era == copies.era || sequence == 0 => (era, sequence),
            // Another primary: what it has of the writes lies below the end of its log.
            Some(_) | None => *self.reached_at.insert((copies.era, copies.sequence)),
        };
        copies.count(record, sequence)
    }
}

#[derive(Debug)]
struct Wait {
    replicas: i64,
    /// `None`: as long as the client stays.
    until: Option<Instant>,
    goals: Vec<Goal>,
    /// Places in `goals` that were asked in this round: shards without a primary or a replica are not.
    asked: Vec<usize>,
    pause: Duration,
}

impl Wait {
    /// After a change of the number of shards, what was written lies in whichever shards have its slots now.
    fn follow(&mut self, routing: &Routing) {
        let is_old = |goal: &Goal| !routing.is_assigned_by(goal.target.keyspace, goal.shard_count);
        let (old, mut goals): (Vec<Goal>, Vec<Goal>) = self.goals.drain(..).partition(is_old);
        for routes in routing.keyspaces() {
            let mut of_it = old.iter().filter(|goal| goal.target.keyspace == routes.record.id).peekable();
            if of_it.peek().is_some() {
                let reached_at =
                    if of_it.all(|goal| goal.reached_at == NOTHING_WRITTEN) { NOTHING_WRITTEN } else { None };
                goals.extend(Goal::of_all(routes, reached_at));
            }
        }
        self.goals = goals;
    }

    fn requests(&mut self, routing: &Routing) -> Vec<ShardRequest> {
        self.follow(routing);
        let may_count = |goal: &Goal| {
            let shard = routing.keyspace(goal.target.keyspace).and_then(|routes| routes.shard(goal.target.shard));
            shard.is_some_and(|shard| !shard.is_vacant() && !shard.replicas.is_empty())
        };
        self.asked = (0..self.goals.len()).filter(|place| may_count(&self.goals[*place])).collect();
        self.asked.iter().map(|place| ask(self.goals[*place].target)).collect()
    }

    fn count(&mut self, routing: &Routing, answers: &[Vec<u8>]) -> usize {
        if self.asked.len() < self.goals.len() {
            return 0;
        }
        let mut least = usize::MAX;
        for (goal, answer) in self.goals.iter_mut().zip(answers) {
            let record = routing.keyspace(goal.target.keyspace).and_then(|routes| routes.shard(goal.target.shard));
            let count = match (record, ShardCopies::parse(answer)) {
                (Some(record), Some(copies)) => goal.count(record, &copies),
                _ => 0,
            };
            least = least.min(count);
        }
        if self.goals.is_empty() { 0 } else { least }
    }
}

impl Ask for Wait {
    /// Any round: it asks what is true at the moment.
    fn start(&mut self, context: &mut Context<'_>) -> Result<Vec<ShardRequest>, CommandError> {
        Ok(self.requests(context.routing))
    }

    fn next(&mut self, context: &mut Context<'_>, answers: Vec<Vec<u8>>) -> Result<Round, CommandError> {
        let count = self.count(context.routing, &answers) as i64;
        let now = Instant::now();
        if count >= self.replicas || self.until.is_some_and(|until| until <= now) {
            context.reply().integer(count);
            return Ok(Round::Done);
        }
        let pause = self.pause.min(self.until.map_or(self.pause, |until| until - now));
        self.pause = (self.pause * 2).min(ASK_AGAIN_MAX);
        let mut otherwise = Vec::new();
        ReplyWriter::new(&mut otherwise).integer(count);
        Ok(Round::Later { pause, requests: self.requests(context.routing), otherwise })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::harness::{Harness, packed};
    use crate::routing::Routing;
    use std::sync::Arc;
    use vasto_proto::id::ShardId;
    use vasto_proto::topology::{NOBODY, Snapshot};

    /// The answer of a primary; followers as (store, connected, in sync, applied).
    pub(crate) fn figures(era: u64, sequence: i64, followers: &[(i64, i64, i64, i64)]) -> Vec<u8> {
        packed(|reply| {
            reply.array(5);
            reply.bulk(b"primary");
            reply.integer(1);
            reply.integer(era as i64);
            reply.integer(sequence);
            reply.array(followers.len());
            for (store, connected, in_sync, applied) in followers {
                reply.array(5);
                [*store, *connected, *in_sync, *applied, 1_500_000]
                    .into_iter()
                    .for_each(|number| reply.integer(number));
            }
        })
    }

    /// Keyspace `users` has one shard on the second store with the first as replica; the shards of keyspace `0` have no replicas.
    fn with_replica(harness: &mut Harness) {
        change(harness, |shard| shard.replicas = vec![StoreId(0xa)]);
    }

    fn change(harness: &mut Harness, change: impl Fn(&mut ShardRecord)) {
        let mut snapshot = Snapshot::clone(&harness.routing.snapshot);
        change(&mut snapshot.keyspaces[1].shards[0]);
        harness.routing = Routing::new(Arc::new(snapshot));
    }

    fn users() -> ShardKey {
        ShardKey { keyspace: KeyspaceId(5), shard: ShardId(0) }
    }

    #[test]
    fn wait_answers_and_errs_as_redis_does() {
        Harness::new().script(
            r#"
            > WAIT a 0 / < -ERR value is not an integer or out of range
            > WAIT 99999999999999999999 0 / < -ERR value is not an integer or out of range
            > WAIT 0 a / < -ERR timeout is not an integer or out of range
            > WAIT 0 -1 / < -ERR timeout is negative
            > WAIT 0 0 / < 0
            > WAIT -1 0 / < 0
            > WAIT 1 10 / < 0
            "#,
        );
    }

    #[test]
    fn wait_asks_until_enough_replicas_have_what_was_written_before() {
        let mut harness = Harness::new();
        with_replica(&mut harness);
        harness.session.written.note(users(), 1);
        let mut answers = [figures(1, 7, &[(0xa, 1, 1, 5)]), figures(1, 9, &[(0xa, 1, 1, 7)])].into_iter();
        // What others write meanwhile is not waited for.
        assert_eq!(harness.run_with("WAIT 1 0", &mut |_| answers.next().expect("asked twice")), "1");
        assert_eq!(answers.len(), 0);
        // Who has gone counts no more, and a copy that is being made never did.
        for follower in [(0xa, 0, 0, 7), (0xc, 1, 1, 7), (0xa, 1, 1, 6)] {
            assert_eq!(harness.run_with("WAIT 1 5", &mut |_| figures(1, 7, &[follower])), "0", "{follower:?}");
        }
        // Another primary counts in another way.
        let mut answers = [figures(1, 7, &[]), figures(2, 3, &[(0xa, 1, 1, 2)]), figures(2, 3, &[(0xa, 1, 1, 3)])];
        answers.reverse();
        let mut answers = answers.to_vec();
        assert_eq!(harness.run_with("WAIT 1 0", &mut |_| answers.pop().expect("asked three times")), "1");
        assert_eq!(harness.run_with("WAIT 1 5", &mut |_| packed(|reply| reply.error("CLUSTERDOWN x"))), "0");
    }

    #[test]
    fn wait_counts_the_least_over_the_shards_that_were_written_to() {
        let mut harness = Harness::new();
        with_replica(&mut harness);
        harness.session.keyspace = users().keyspace;
        // Nothing was written: whoever follows has it.
        assert_eq!(harness.run_with("WAIT 1 0", &mut |_| figures(1, 7, &[(0xa, 1, 0, 0)])), "1");
        harness.session.written.note(users(), 1);
        harness.session.written.note(ShardKey { keyspace: KeyspaceId(0), shard: ShardId(1) }, 3);
        assert_eq!(harness.run_with("WAIT 1 5", &mut |_| figures(1, 7, &[(0xa, 1, 1, 7)])), "0");
        harness.session.written = Default::default();
        harness.session.written.note(users(), 1);
        change(&mut harness, |shard| shard.primary = NOBODY);
        assert_eq!(harness.run("WAIT 1 5"), "0", "a vacant shard is not asked");
    }

    #[test]
    fn wait_asks_the_shards_that_have_the_slots_now() {
        let mut harness = Harness::new();
        with_replica(&mut harness);
        harness.session.written.note(users(), 1);
        let mut reply = Vec::new();
        let Ok(Next::Ask(mut waiting)) = wait(&mut harness.context(&mut reply), Args::new(arguments(&["1", "0"])))
        else {
            panic!("it asks");
        };
        assert_eq!(waiting.start(&mut harness.context(&mut reply)).expect("a round").len(), 1);
        let mut snapshot = Snapshot::clone(&harness.routing.snapshot);
        let grown = snapshot.keyspaces[1].begin_resize(2, vec![StoreId(0xb)]).expect("a resize");
        let mut grown = grown.fence().expect("a fence").commit().expect("a commit");
        grown.shards[1].replicas = vec![StoreId(0xa)];
        snapshot.keyspaces[1] = grown;
        harness.routing = Routing::new(Arc::new(snapshot));
        // One that waits asks again, and the new shard's replica counts from the end of its log on.
        let Ok(Round::Again(requests)) = waiting.again(&mut harness.context(&mut reply), &[None]) else {
            panic!("it asks again");
        };
        assert_eq!(requests.iter().map(|request| request.target.shard.0).collect::<Vec<_>>(), [0, 1]);
        let answers = vec![figures(1, 7, &[(0xa, 1, 1, 7)]), figures(1, 9, &[(0xa, 1, 1, 8)])];
        assert!(matches!(waiting.next(&mut harness.context(&mut reply), answers), Ok(Round::Later { .. })));
        let answers = vec![figures(1, 8, &[(0xa, 1, 1, 7)]), figures(1, 9, &[(0xa, 1, 1, 9)])];
        assert!(matches!(waiting.next(&mut harness.context(&mut reply), answers), Ok(Round::Done)));
        let mut asked = std::collections::BTreeSet::new();
        let answered = harness.run_with("WAIT 1 0", &mut |request| {
            asked.insert(request.target.shard.0);
            figures(1, 7, &[(0xa, 1, 1, 7)])
        });
        assert_eq!((answered.as_str(), asked.len()), ("1", 2));
    }

    fn arguments(words: &[&'static str]) -> vasto_proto::batch::Arguments<'static> {
        let mut packed = Vec::new();
        words.iter().for_each(|word| vasto_proto::batch::write_bytes(&mut packed, word.as_bytes()));
        vasto_proto::batch::Arguments::parse(packed.leak(), words.len() as u32).expect("packed right here")
    }

    #[test]
    fn role_is_a_master_with_the_replicas_that_are_online() {
        let mut harness = Harness::new();
        assert_eq!(harness.run_with("ROLE", &mut |_| figures(1, 5, &[])), r#"["master", 15, []]"#);
        with_replica(&mut harness);
        harness.session.keyspace = users().keyspace;
        let mut role = |followers: &[(i64, i64, i64, i64)]| harness.run_with("ROLE", &mut |_| figures(1, 7, followers));
        assert_eq!(role(&[(0xa, 1, 1, 4)]), r#"["master", 7, [["10.0.0.10", "7201", "4"]]]"#);
        assert_eq!(role(&[(0xa, 1, 0, 4), (0xb, 0, 0, 4)]), r#"["master", 7, []]"#);
        assert_eq!(harness.run_with("ROLE", &mut |_| packed(|reply| reply.error("x"))), r#"["master", 0, []]"#);
        assert_eq!(harness.run("ROLE x"), "-ERR wrong number of arguments for 'role' command");
    }

    #[test]
    fn the_replication_id_has_forty_digits() {
        let id = replication_id(ClusterId(0xc));
        assert!(id.len() == 40 && id.starts_with("000000000000000c"), "{id}");
        assert_ne!(id, replication_id(ClusterId(0xd)));
    }
}
