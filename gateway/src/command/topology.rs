//! The cluster as this gateway knows it: slots, stores, keyspaces. Arrays of maps, readable in redis-cli and easy to parse.

use super::config::alter;
use super::{Context, Next};
use crate::settings::Changes;
use vasto_proto::command::{Args, ReplyWriter};
use vasto_proto::error::{self, CommandError};
use vasto_proto::slot::slot_of;
use vasto_proto::topology::{Fsync, KeyspaceRecord, Settings, Snapshot, StoreInfo};

/// A value of a field.
enum Value<'a> {
    Text(&'a str),
    Number(u64),
}

fn fields(reply: &mut ReplyWriter<'_>, fields: &[(&str, Value<'_>)]) {
    for (name, value) in fields {
        reply.bulk(name.as_bytes());
        match value {
            Value::Text(text) => reply.bulk(text.as_bytes()),
            Value::Number(number) => reply.integer(i64::try_from(*number).unwrap_or(i64::MAX)),
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
        for shard in 0..keyspace.shards.len() {
            reply.map(SHARD_FIELDS + 1);
            fields(&mut reply, &[("keyspace", Value::Text(&keyspace.name))]);
            write_shard(&mut reply, snapshot, keyspace, shard);
        }
    }
    Ok(Next::Replied)
}

const SHARD_FIELDS: usize = 6;

fn write_shard(reply: &mut ReplyWriter<'_>, snapshot: &Snapshot, keyspace: &KeyspaceRecord, number: usize) {
    let shard = &keyspace.shards[number];
    let store = snapshot.store(shard.primary);
    fields(
        reply,
        &[
            ("shard", Value::Number(number as u64)),
            ("epoch", Value::Number(shard.epoch.0)),
            ("primary", Value::Text(&shard.primary.to_string())),
            ("address", Value::Text(store.map_or("", |store| &store.address))),
            ("state", Value::Text(state(store))),
        ],
    );
    reply.bulk(b"replicas");
    reply.array(shard.replicas.len());
    shard.replicas.iter().for_each(|replica| reply.bulk(replica.to_string().as_bytes()));
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
    let mut reply = ReplyWriter::new(context.reply);
    reply.array(snapshot.stores.len());
    for store in &snapshot.stores {
        let shards: usize = snapshot.keyspaces.iter().map(|keyspace| keyspace.shards_of(store.id).count()).sum();
        reply.map(7);
        fields(
            &mut reply,
            &[
                ("id", Value::Text(&store.id.to_string())),
                ("address", Value::Text(&store.address)),
                ("state", Value::Text(state(Some(store)))),
                ("free_disk_bytes", Value::Number(store.free_disk_bytes)),
                ("shards", Value::Number(shards as u64)),
                ("zone", Value::Text(&store.zone)),
            ],
        );
        reply.bulk(b"tags");
        reply.array(store.tags.len());
        store.tags.iter().for_each(|tag| reply.bulk(tag.as_bytes()));
    }
    Ok(Next::Replied)
}

const KEYSPACE_FIELDS: usize = 6;

fn write_keyspace(reply: &mut ReplyWriter<'_>, snapshot: &Snapshot, keyspace: &KeyspaceRecord) {
    fields(
        reply,
        &[
            ("name", Value::Text(&keyspace.name)),
            ("id", Value::Number(u64::from(keyspace.id.0))),
            ("epoch", Value::Number(keyspace.epoch.0)),
            ("copies", Value::Number(u64::from(keyspace.copies))),
            ("shards", Value::Number(u64::from(keyspace.shard_count()))),
            ("fsync", Value::Text(snapshot.fsync(keyspace).word())),
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

/// One map, with the shards as an array of maps in it.
pub fn keyspace_info(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let keyspace = named_keyspace(&context.routing.snapshot, args.bytes()?)?;
    let snapshot = &context.routing.snapshot;
    let mut reply = ReplyWriter::new(context.reply);
    reply.map(KEYSPACE_FIELDS + 1);
    write_keyspace(&mut reply, snapshot, keyspace);
    reply.bulk(b"layout");
    reply.array(keyspace.shards.len());
    for shard in 0..keyspace.shards.len() {
        reply.map(SHARD_FIELDS);
        write_shard(&mut reply, snapshot, keyspace, shard);
    }
    Ok(Next::Replied)
}

/// The keyspace that a command names.
pub fn named_keyspace<'a>(snapshot: &'a Snapshot, name: &[u8]) -> Result<&'a KeyspaceRecord, CommandError> {
    snapshot.keyspaces.iter().find(|keyspace| keyspace.name.as_bytes() == name).ok_or_else(|| {
        let text = format!("ERR no such keyspace '{}'", String::from_utf8_lossy(name));
        error::single_line(&text).into_owned().into()
    })
}

/// KEYSPACE ALTER name option value…: through the master, for all gateways.
pub fn keyspace_alter(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let keyspace = named_keyspace(&context.routing.snapshot, args.bytes()?)?;
    let mut settings = Settings::default();
    while !args.is_empty() {
        if !args.option("fsync") {
            return Err(error::SYNTAX);
        }
        settings.fsync = Some(Fsync::from_word(args.bytes()?).ok_or(UNKNOWN_FSYNC)?);
    }
    Ok(alter(keyspace, settings, Changes::default()))
}

pub const UNKNOWN_FSYNC: CommandError = CommandError::fixed("ERR FSYNC is one of always, everysec, no");

#[cfg(test)]
mod tests {
    use crate::command::harness::Harness;
    use crate::upstream::masters::Change;

    #[test]
    fn the_topology_is_an_array_of_maps() {
        let mut harness = Harness::new();
        harness.script(
            r#"
            > KEYSLOT {user1000}.following / < 3443
            > KEYSPACE LIST / < [{"name": "0", "id": 0, "epoch": 1, "copies": 1, "shards": 3, "fsync": "everysec"}, {"name": "users", "id": 5, "epoch": 1, "copies": 1, "shards": 1, "fsync": "everysec"}]
            > KEYSPACE INFO users / < {"name": "users", "id": 5, "epoch": 1, "copies": 1, "shards": 1, "fsync": "everysec", "layout": [{"shard": 0, "epoch": 1, "primary": "0000000b", "address": "10.0.0.11:7201", "state": "down", "replicas": []}]}
            > KEYSPACE INFO nosuch / < -ERR no such keyspace 'nosuch'
            > STORES / < [{"id": "0000000a", "address": "10.0.0.10:7201", "state": "up", "free_disk_bytes": 1073741824, "shards": 2, "zone": "", "tags": []}, {"id": "0000000b", "address": "10.0.0.11:7201", "state": "down", "free_disk_bytes": 1073741824, "shards": 2, "zone": "cellar", "tags": ["ssd", "old"]}]
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
    fn a_keyspace_is_altered_by_the_master() {
        let mut harness = Harness::new();
        harness.script(
            r#"
            > KEYSPACE ALTER users FSYNC / < -ERR wrong number of arguments for 'keyspace|alter' command
            > KEYSPACE ALTER nosuch FSYNC no / < -ERR no such keyspace 'nosuch'
            > KEYSPACE ALTER users COLOUR red / < -ERR syntax error
            > KEYSPACE ALTER users FSYNC red / < -ERR FSYNC is one of always, everysec, no
            > KEYSPACE ALTER users FSYNC no FSYNC / < -ERR syntax error
            "#,
        );
        assert_eq!(harness.asked_master, None);
        assert_eq!(harness.run("KEYSPACE ALTER users fsync NO"), "OK");
        let Some(Change::Alter(asked)) = harness.asked_master else { panic!("the master was asked") };
        assert_eq!((asked.name.as_str(), asked.changes.fsync), ("users", Some(vasto_proto::topology::Fsync::Never)));
    }
}
