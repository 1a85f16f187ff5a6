//! The cluster as this gateway knows it: slots, stores, keyspaces. Arrays of maps, readable in redis-cli and easy to parse.

use super::replication::{self, Follower, ShardCopies};
use super::{Ask, Context, Next, Round, ShardRequest};
use crate::operation;
use vasto_proto::command::{Args, ReplyWriter};
use vasto_proto::error::{self, CommandError};
use vasto_proto::id::{ShardId, ShardKey, StoreId};
use vasto_proto::slot::{SLOT_COUNT, SlotTable, slot_of};
use vasto_proto::topology::{HolderGroup, KeyspaceRecord, ShardRecord, Snapshot, StoreInfo};

/// A value of a field.
enum Value<'a> {
    Text(&'a str),
    Number(u64),
    Unknown,
}

fn fields(reply: &mut ReplyWriter<'_>, fields: &[(&str, Value<'_>)]) {
    for (name, value) in fields {
        reply.bulk(name.as_bytes());
        match value {
            Value::Text(text) => reply.bulk(text.as_bytes()),
            Value::Number(number) => reply.integer(i64::try_from(*number).unwrap_or(i64::MAX)),
            Value::Unknown => reply.null(),
        }
    }
}

pub fn keyslot(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let slot = slot_of(args.key()?);
    context.reply().integer(i64::from(slot));
    Ok(Next::Replied)
}

/// One map per shard of every keyspace.
pub fn topology(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    let snapshot = &context.routing.snapshot;
    let mut reply = ReplyWriter::new(context.reply);
    reply.array(snapshot.keyspaces.iter().map(|keyspace| keyspace.shards.len()).sum());
    for keyspace in &snapshot.keyspaces {
        let slots = slots_by_shard(keyspace);
        for shard in 0..keyspace.shards.len() {
            reply.map(SHARD_FIELDS + 1);
            fields(&mut reply, &[("keyspace", Value::Text(&keyspace.name))]);
            write_shard(&mut reply, snapshot, keyspace, shard, &slots);
        }
    }
    Ok(Next::Replied)
}

/// How many slots are assigned to each shard, the last ones without any left out.
fn slots_by_shard(keyspace: &KeyspaceRecord) -> Vec<u64> {
    let table = SlotTable::new(keyspace.shard_count());
    let mut slots = vec![0; usize::from(keyspace.shard_count())];
    (0..SLOT_COUNT).for_each(|slot| slots[usize::from(table.shard(slot).0)] += 1);
    slots
}

const SHARD_FIELDS: usize = 9;

fn write_shard(
    reply: &mut ReplyWriter<'_>,
    snapshot: &Snapshot,
    keyspace: &KeyspaceRecord,
    number: usize,
    slots: &[u64],
) {
    let shard = &keyspace.shards[number];
    let store = snapshot.store(shard.primary);
    let (primary, state) =
        if shard.is_vacant() { (String::new(), "vacant") } else { (shard.primary.to_string(), state(store)) };
    fields(
        reply,
        &[
            ("shard", Value::Number(number as u64)),
            ("epoch", Value::Number(shard.epoch.0)),
            ("primary", Value::Text(&primary)),
            ("address", Value::Text(store.map_or("", |store| &store.address))),
            ("state", Value::Text(state)),
            ("slots", Value::Number(slots.get(number).copied().unwrap_or(0))),
            ("operation", Value::Text(&operation::part_of_shard(keyspace, number))),
        ],
    );
    for (name, stores) in [("replicas", &shard.replicas), ("learners", &shard.learners)] {
        reply.bulk(name.as_bytes());
        reply.array(stores.len());
        stores.iter().for_each(|store| reply.bulk(store.to_string().as_bytes()));
    }
}

const FOLLOWER_FIELDS: usize = 6;

/// A copy beside the primary; `copies` is what the primary says, if it was reached.
fn write_follower(
    reply: &mut ReplyWriter<'_>,
    snapshot: &Snapshot,
    shard: &ShardRecord,
    store: StoreId,
    copies: Option<&ShardCopies>,
) {
    let info = snapshot.store(store);
    let is_replica = shard.replicas.contains(&store);
    let follower = copies.and_then(|copies| copies.follower(store));
    let state = match follower {
        None | Some(Follower { connected: false, .. }) if !info.is_some_and(|info| info.up) => "down",
        None => "unknown",
        Some(Follower { connected: false, .. }) => "away",
        Some(_) if !is_replica => "being made",
        Some(Follower { in_sync: true, .. }) => "in sync",
        Some(_) => "behind",
    };
    let behind = |(copies, follower): (&ShardCopies, &Follower)| copies.sequence.saturating_sub(follower.applied);
    let lag_ms = |follower: &Follower| u64::try_from(follower.lag.as_millis()).unwrap_or(u64::MAX);
    reply.map(FOLLOWER_FIELDS);
    fields(
        reply,
        &[
            ("store", Value::Text(&store.to_string())),
            ("address", Value::Text(info.map_or("", |info| &info.address))),
            ("role", Value::Text(if is_replica { "replica" } else { "learner" })),
            ("state", Value::Text(state)),
            // Entries of the primary's log.
            ("behind", copies.zip(follower).map(behind).map_or(Value::Unknown, Value::Number)),
            ("lag_ms", follower.map(lag_ms).map_or(Value::Unknown, Value::Number)),
        ],
    );
}

fn state(store: Option<&StoreInfo>) -> &'static str {
    match store {
        Some(store) if store.up => "up",
        Some(_) => "down",
        None => "unknown",
    }
}

/// One map per store.
pub fn stores(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    let snapshot = &context.routing.snapshot;
    let group = &snapshot.leadership.group;
    let automatic = automatic_failover(group);
    let mut reply = ReplyWriter::new(context.reply);
    reply.array(snapshot.stores.len());
    for store in &snapshot.stores {
        let shards: usize = snapshot.keyspaces.iter().map(|keyspace| keyspace.shards_of(store.id).count()).sum();
        let count = |stores: fn(&ShardRecord) -> &Vec<StoreId>| {
            let shards = snapshot.keyspaces.iter().flat_map(|keyspace| &keyspace.shards);
            shards.filter(|shard| stores(shard).contains(&store.id)).count() as u64
        };
        reply.map(12);
        fields(
            &mut reply,
            &[
                ("id", Value::Text(&store.id.to_string())),
                ("address", Value::Text(&store.address)),
                ("state", Value::Text(state(Some(store)))),
                ("free_disk_bytes", Value::Number(store.free_disk_bytes)),
                ("shards", Value::Number(shards as u64)),
                ("replicas", Value::Number(count(|shard| &shard.replicas))),
                ("learners", Value::Number(count(|shard| &shard.learners))),
                ("zone", Value::Text(&store.zone)),
                ("holder", Value::Text(if group.members.contains(&store.id) { "yes" } else { "no" })),
                ("automatic_failover", Value::Text(&automatic)),
            ],
        );
        reply.bulk(b"tags");
        reply.array(store.tags.len());
        store.tags.iter().for_each(|tag| reply.bulk(tag.as_bytes()));
        // Of the keyspaces of which it has copies.
        let operations = snapshot
            .keyspaces
            .iter()
            .filter(|keyspace| keyspace.active_operation().is_some() && keyspace.shards_of(store.id).next().is_some());
        let operations: Vec<String> =
            operations.map(|keyspace| format!("{}: {}", keyspace.name, operation::summary(keyspace))).collect();
        reply.bulk(b"operations");
        reply.array(operations.len());
        operations.iter().for_each(|operation| reply.bulk(operation.as_bytes()));
    }
    Ok(Next::Replied)
}

/// Whether the loss of one store is dealt with by itself, and if not, why.
pub fn automatic_failover(group: &HolderGroup) -> String {
    match group.members.len() {
        0 => "no: there are no holders of the records yet".to_owned(),
        1 | 2 => format!("no: {} of the 3 holders that it takes", group.members.len()),
        _ => "yes".to_owned(),
    }
}

const KEYSPACE_FIELDS: usize = 10;

fn write_keyspace(reply: &mut ReplyWriter<'_>, snapshot: &Snapshot, keyspace: &KeyspaceRecord) {
    fields(
        reply,
        &[
            ("name", Value::Text(&keyspace.name)),
            ("id", Value::Number(u64::from(keyspace.id.0))),
            ("epoch", Value::Number(keyspace.epoch.0)),
            ("copies", Value::Number(u64::from(keyspace.copies))),
            ("shards", Value::Number(u64::from(keyspace.shard_count()))),
            ("vacant_shards", Value::Number(keyspace.shards.iter().filter(|shard| shard.is_vacant()).count() as u64)),
            ("fsync", Value::Text(snapshot.fsync(keyspace).word())),
            ("min_replicas", Value::Number(u64::from(keyspace.settings.min_replicas()))),
            ("strict", Value::Text(if keyspace.settings.strict() { "yes" } else { "no" })),
            ("operation", Value::Text(&operation::summary(keyspace))),
        ],
    );
}

/// One map per keyspace.
pub fn keyspace_list(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    let snapshot = &context.routing.snapshot;
    let mut reply = ReplyWriter::new(context.reply);
    reply.array(snapshot.keyspaces.len());
    for keyspace in &snapshot.keyspaces {
        reply.map(KEYSPACE_FIELDS);
        write_keyspace(&mut reply, snapshot, keyspace);
    }
    Ok(Next::Replied)
}

/// One map, with the shards as an array of maps in it. Primaries are asked how far the other copies are.
pub fn keyspace_info(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let keyspace = named_keyspace(&context.routing.snapshot, args.bytes()?)?;
    if shards_with_followers(keyspace).is_empty() {
        write_keyspace_info(context, keyspace.clone(), &[]);
        return Ok(Next::Replied);
    }
    Ok(Next::Ask(Box::new(KeyspaceInfo { keyspace: keyspace.clone(), asked: Vec::new() })))
}

/// Those whose primaries can tell of other copies.
fn shards_with_followers(keyspace: &KeyspaceRecord) -> Vec<ShardKey> {
    let has_followers = |shard: &ShardRecord| !shard.is_vacant() && shard.copies().nth(1).is_some();
    let shards = keyspace.shards.iter().enumerate().filter(|(_, shard)| has_followers(shard));
    shards.map(|(number, _)| ShardKey { keyspace: keyspace.id, shard: ShardId(number as u16) }).collect()
}

#[derive(Debug)]
struct KeyspaceInfo {
    keyspace: KeyspaceRecord,
    asked: Vec<ShardKey>,
}

impl Ask for KeyspaceInfo {
    fn start(&mut self, context: &mut Context<'_>) -> Result<Vec<ShardRequest>, CommandError> {
        // It has changed when it is asked again.
        let newest = context.routing.snapshot.keyspace(self.keyspace.id).unwrap_or(&self.keyspace);
        self.asked = shards_with_followers(newest);
        Ok(self.asked.iter().map(|target| replication::ask(*target)).collect())
    }

    fn next(&mut self, context: &mut Context<'_>, answers: Vec<Vec<u8>>) -> Result<Round, CommandError> {
        let copies = |(target, answer): (&ShardKey, &Vec<u8>)| Some((target.shard, ShardCopies::parse(answer)?));
        let copies: Vec<(ShardId, ShardCopies)> = self.asked.iter().zip(&answers).filter_map(copies).collect();
        // It may have changed while the shards were asked.
        let keyspace = context.routing.snapshot.keyspace(self.keyspace.id).unwrap_or(&self.keyspace).clone();
        write_keyspace_info(context, keyspace, &copies);
        Ok(Round::Done)
    }
}

fn write_keyspace_info(context: &mut Context<'_>, keyspace: KeyspaceRecord, copies: &[(ShardId, ShardCopies)]) {
    let snapshot = &context.routing.snapshot;
    let mut reply = ReplyWriter::new(context.reply);
    reply.map(KEYSPACE_FIELDS + 1);
    write_keyspace(&mut reply, snapshot, &keyspace);
    reply.bulk(b"layout");
    reply.array(keyspace.shards.len());
    let slots = slots_by_shard(&keyspace);
    for (number, shard) in keyspace.shards.iter().enumerate() {
        reply.map(SHARD_FIELDS + 1);
        write_shard(&mut reply, snapshot, &keyspace, number, &slots);
        let copies = copies.iter().find(|(known, _)| usize::from(known.0) == number).map(|(_, copies)| copies);
        let followers: Vec<StoreId> = shard.replicas.iter().chain(&shard.learners).copied().collect();
        reply.bulk(b"followers");
        reply.array(followers.len());
        followers.into_iter().for_each(|store| write_follower(&mut reply, snapshot, shard, store, copies));
    }
}

/// The keyspace that a command names.
pub fn named_keyspace<'a>(snapshot: &'a Snapshot, name: &[u8]) -> Result<&'a KeyspaceRecord, CommandError> {
    snapshot.keyspaces.iter().find(|keyspace| keyspace.name.as_bytes() == name).ok_or_else(|| {
        let text = format!("ERR no such keyspace '{}'", String::from_utf8_lossy(name));
        error::single_line(&text).into_owned().into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::harness::{Harness, packed};
    use crate::routing::Routing;
    use std::sync::Arc;
    use vasto_proto::topology::NOBODY;

    #[test]
    fn the_topology_is_an_array_of_maps() {
        let mut harness = Harness::new();
        harness.script(
            r#"
            > KEYSLOT {user1000}.following / < 3443
            > KEYSPACE LIST / < [{"name": "0", "id": 0, "epoch": 1, "copies": 1, "shards": 3, "vacant_shards": 0, "fsync": "everysec", "min_replicas": 0, "strict": "yes", "operation": ""}, {"name": "users", "id": 5, "epoch": 1, "copies": 1, "shards": 1, "vacant_shards": 0, "fsync": "everysec", "min_replicas": 0, "strict": "yes", "operation": ""}]
            > KEYSPACE INFO users / < {"name": "users", "id": 5, "epoch": 1, "copies": 1, "shards": 1, "vacant_shards": 0, "fsync": "everysec", "min_replicas": 0, "strict": "yes", "operation": "", "layout": [{"shard": 0, "epoch": 1, "primary": "0000000b", "address": "10.0.0.11:7201", "state": "down", "slots": 16384, "operation": "", "replicas": [], "learners": [], "followers": []}]}
            > KEYSPACE INFO nosuch / < -ERR no such keyspace 'nosuch'
            > STORES / < [{"id": "0000000a", "address": "10.0.0.10:7201", "state": "up", "free_disk_bytes": 1073741824, "shards": 2, "replicas": 0, "learners": 0, "zone": "", "holder": "no", "automatic_failover": "no: there are no holders of the records yet", "tags": [], "operations": []}, {"id": "0000000b", "address": "10.0.0.11:7201", "state": "down", "free_disk_bytes": 1073741824, "shards": 2, "replicas": 0, "learners": 0, "zone": "cellar", "holder": "no", "automatic_failover": "no: there are no holders of the records yet", "tags": ["ssd", "old"], "operations": []}]
            "#,
        );
        let topology = harness.run("TOPOLOGY");
        assert!(
            topology.starts_with(r#"[{"keyspace": "0", "shard": 0, "epoch": 1, "primary": "0000000a", "#),
            "{topology}"
        );
        assert_eq!(topology.matches("\"shard\":").count(), 4);
    }

    #[test]
    fn an_operation_is_shown_with_the_keyspace_its_shards_and_its_stores() {
        let mut harness = Harness::new();
        let mut snapshot = Snapshot::clone(&harness.routing.snapshot);
        let growing = snapshot.keyspaces[1].begin_resize(2, vec![StoreId(0xa)]).expect("possible");
        snapshot.keyspaces[1] = growing;
        harness.routing = Routing::new(Arc::new(snapshot));
        let list = harness.run("KEYSPACE LIST");
        assert!(list.contains(r#""name": "users", "id": 5, "epoch": 2, "copies": 1, "shards": 1,"#), "{list}");
        assert!(list.contains(r#""operation": "resize from 1 to 2 shards: copy"}]"#), "{list}");
        let info = harness.run_with("KEYSPACE INFO users", &mut |_| packed(|reply| reply.error("x")));
        for part in ["gives slots", "gets slots"] {
            assert!(info.contains(&format!(r#""operation": "{part}", "replicas": []"#)), "{info}");
        }
        let stores = harness.run("STORES");
        assert_eq!(
            stores.matches(r#""operations": ["users: resize from 1 to 2 shards: copy"]"#).count(),
            2,
            "{stores}"
        );
        assert!(harness.run("TOPOLOGY").contains(r#""operation": "gets slots""#));
    }

    #[test]
    fn every_slot_is_shown_with_one_shard() {
        let mut harness = Harness::new();
        let mut show = |record: &KeyspaceRecord| {
            let snapshot = Snapshot { keyspaces: vec![record.clone()], ..Snapshot::clone(&harness.routing.snapshot) };
            harness.routing = Routing::new(Arc::new(snapshot));
            let info = harness.run("KEYSPACE INFO users");
            let slots: Vec<u64> = info
                .split("\"slots\": ")
                .skip(1)
                .map(|rest| rest.split(',').next().expect("a number").parse().expect("a number"))
                .collect();
            assert_eq!(slots.iter().sum::<u64>(), u64::from(SLOT_COUNT), "{info}");
            assert!(info.contains(&format!("\"shards\": {},", record.shard_count())), "{info}");
            slots.len()
        };
        let record = KeyspaceRecord::new(vasto_proto::id::KeyspaceId(5), "users", &[StoreId(0xa)]).expect("valid");
        let growing = record.begin_resize(3, vec![StoreId(0xb); 2]).expect("a resize");
        assert_eq!(show(&record), 1);
        assert_eq!(show(&growing), 3);
        let grown = growing.fence().expect("a fence").commit().expect("a commit");
        assert_eq!(show(&grown), 3);
        let grown = grown.clean().expect("cleaned").finish().expect("done");
        let shrinking = grown.begin_resize(2, Vec::new()).expect("a resize");
        assert_eq!(show(&shrinking), 3);
        assert_eq!(show(&shrinking.fence().expect("a fence").commit().expect("a commit")), 3);
    }

    #[test]
    fn copies_are_shown_with_what_their_primary_says_of_them() {
        let mut harness = Harness::new();
        let change = |harness: &mut Harness, change: &dyn Fn(&mut ShardRecord)| {
            let mut snapshot = Snapshot::clone(&harness.routing.snapshot);
            change(&mut snapshot.keyspaces[1].shards[0]);
            harness.routing = Routing::new(Arc::new(snapshot));
        };
        change(&mut harness, &|shard| (shard.replicas, shard.learners) = (vec![StoreId(0xa)], vec![StoreId(0xc)]));
        let mut followers = |applied: i64, is_connected: bool| {
            let text = harness.run_with("KEYSPACE INFO users", &mut |request| {
                assert_eq!((request.target.keyspace.0, request.target.shard), (5, ShardId(0)));
                packed(|reply| {
                    reply.array(5);
                    reply.bulk(b"primary");
                    [1, 1, 10].into_iter().for_each(|number| reply.integer(number));
                    reply.array(2);
                    for (store, applied) in [(0xa, applied), (0xc, 2)] {
                        reply.array(5);
                        let in_sync = i64::from(applied == 10);
                        [store, i64::from(is_connected), in_sync, applied, 2500]
                            .into_iter()
                            .for_each(|number| reply.integer(number));
                    }
                })
            });
            text.split_once("\"followers\": ").expect("there are some").1.to_owned()
        };
        assert_eq!(
            followers(10, true),
            r#"[{"store": "0000000a", "address": "10.0.0.10:7201", "role": "replica", "state": "in sync", "behind": 0, "lag_ms": 2}, {"store": "0000000c", "address": "", "role": "learner", "state": "being made", "behind": 8, "lag_ms": 2}]}]}"#
        );
        assert!(followers(9, true).contains(r#""state": "behind", "behind": 1,"#));
        let away = followers(10, false);
        assert!(away.contains(r#""state": "away""#) && away.contains(r#""state": "down""#), "{away}");
        let unknown = harness.run_with("KEYSPACE INFO users", &mut |_| packed(|reply| reply.error("x")));
        assert!(unknown.contains(r#""state": "unknown", "behind": null, "lag_ms": null"#), "{unknown}");
        assert!(unknown.contains(r#""replicas": ["0000000a"], "learners": ["0000000c"]"#), "{unknown}");
        assert!(harness.run("STORES").contains(r#""shards": 2, "replicas": 1, "learners": 0"#));
        change(&mut harness, &|shard| shard.primary = NOBODY);
        let vacant = harness.run("KEYSPACE INFO users");
        assert!(vacant.contains(r#""vacant_shards": 1"#), "{vacant}");
        assert!(vacant.contains(r#""primary": "", "address": "", "state": "vacant""#), "{vacant}");
        assert!(harness.run("TOPOLOGY").contains(r#""state": "vacant""#));
    }
}
