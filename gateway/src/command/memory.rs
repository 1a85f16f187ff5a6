//! MEMORY: what memory is used for, here and in the stores. MEMORY USAGE of a key is the store's.
//!
//! Figures of `allocated` are those of the process that was asked, as in INFO memory; rows and caches are those of all stores, which are
//! other processes unless everything runs in one.

use super::figures::{Figures, Walk};
use super::{Ask, Context, Next, Round, ShardRequest};
use crate::process::Memory;
use std::fmt::Write as _;
use vasto_proto::command::Args;
use vasto_proto::error::CommandError;

pub fn doctor(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    let text = "This gateway keeps no data: its memory is its connections and what is under way, both bounded by settings. \
                The stores' caches are bounded by theirs. MEMORY STATS, INFO memory and INFO vasto show the figures.\n";
    context.reply().verbatim(text);
    Ok(Next::Replied)
}

pub fn purge(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    context.reply().ok();
    Ok(Next::Replied)
}

/// mimalloc's own report cannot be asked for without unsafe code; the kernel's view of what it holds can.
pub fn malloc_stats(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    let memory = Memory::read();
    let mut text = String::from("Allocator: mimalloc. Bytes of this process, as the kernel counts them:\n");
    for (name, bytes) in [
        ("resident", memory.resident),
        ("resident at most so far", memory.peak),
        ("resident and no file's", memory.anonymous),
        ("swapped out", memory.swapped),
    ] {
        let _ = writeln!(text, "{name}: {bytes}");
    }
    context.reply().verbatim(&text);
    Ok(Next::Replied)
}

pub fn stats(_context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    Ok(Next::Ask(Box::<Stats>::default()))
}

/// Asks every shard for its figures.
#[derive(Debug, Default)]
struct Stats {
    figures: Figures,
}

/// A value of MEMORY STATS.
enum Value {
    Bytes(u64),
    Number(i64),
    Ratio(f64),
}

impl Ask for Stats {
    fn start(&mut self, context: &mut Context<'_>) -> Result<Vec<ShardRequest>, CommandError> {
        let (figures, requests) = Figures::ask(context, Walk::CountKeys);
        self.figures = figures;
        Ok(requests)
    }

    fn next(&mut self, context: &mut Context<'_>, answers: Vec<Vec<u8>>) -> Result<Round, CommandError> {
        self.figures.take(&answers);
        let figures = &self.figures;
        let memory = Memory::read();
        let clients = context.shared.clients.all();
        let buffers: usize = clients.iter().map(|client| client.query_bytes() + client.output_bytes()).sum();
        let (keys, row_bytes) = (figures.sum("keys"), figures.sum("row_bytes"));
        let values = [
            ("peak.allocated", Value::Bytes(memory.peak)),
            ("total.allocated", Value::Bytes(memory.resident)),
            ("startup.allocated", Value::Bytes(context.shared.started_with.resident)),
            ("clients.normal", Value::Bytes(buffers as u64)),
            // There is none of these here.
            ("replication.backlog", Value::Number(0)),
            ("clients.slaves", Value::Number(0)),
            ("cluster.links", Value::Number(0)),
            ("aof.buffer", Value::Number(0)),
            ("lua.caches", Value::Number(0)),
            ("functions.caches", Value::Number(0)),
            ("keys.count", Value::Number(keys)),
            ("keys.bytes-per-key", Value::Number(row_bytes.checked_div(keys).unwrap_or(0))),
            ("dataset.bytes", Value::Number(row_bytes)),
            ("peak.percentage", Value::Ratio(memory.resident as f64 * 100.0 / memory.peak.max(1) as f64)),
            ("stores.row-cache.bytes", Value::Number(figures.sum_of_stores("row_cache_bytes"))),
            ("stores.block-cache.bytes", Value::Number(figures.sum_of_stores("block_cache_bytes"))),
            ("stores.memtables.bytes", Value::Number(figures.sum("memtable_bytes"))),
            ("stores.disk.bytes", Value::Number(figures.sum("disk_bytes"))),
            ("shards.unreachable", Value::Number(figures.unreachable() as i64)),
        ];
        let mut reply = context.reply();
        reply.map(values.len());
        for (name, value) in values {
            reply.bulk(name.as_bytes());
            match value {
                Value::Bytes(bytes) => reply.integer(i64::try_from(bytes).unwrap_or(i64::MAX)),
                Value::Number(number) => reply.integer(number),
                Value::Ratio(ratio) => reply.double(ratio),
            }
        }
        Ok(Round::Done)
    }
}

#[cfg(test)]
mod tests {
    use crate::command::harness::{Harness, packed};

    #[test]
    fn stats_add_up_what_the_shards_say() {
        let mut harness = Harness::new();
        let text = harness.run_with("MEMORY STATS", &mut |_| {
            packed(|reply| {
                reply.array(1);
                reply.map(4);
                for (name, value) in
                    [("keys", 10), ("row_bytes", 500), ("disk_bytes", 300), ("store_row_cache_bytes", 1000)]
                {
                    reply.bulk(name.as_bytes());
                    reply.integer(value);
                }
            })
        });
        // Four shards on two stores.
        for field in [
            r#""keys.count": 40, "keys.bytes-per-key": 50, "dataset.bytes": 2000, "#,
            r#""stores.row-cache.bytes": 2000, "#,
            r#""stores.disk.bytes": 1200, "shards.unreachable": 0}"#,
        ] {
            assert!(text.contains(field), "{field} in {text}");
        }
        let text = harness.run_with("MEMORY STATS", &mut |_| packed(|reply| reply.error("CLUSTERDOWN x")));
        assert!(text.contains(r#""keys.bytes-per-key": 0, "#) && text.contains(r#""shards.unreachable": 4"#), "{text}");
    }

    #[test]
    fn the_others_say_what_is_so() {
        let mut harness = Harness::new();
        assert_eq!(harness.run("MEMORY PURGE"), "OK");
        assert!(harness.run("MEMORY DOCTOR").starts_with("txt:"));
        assert!(harness.run("MEMORY MALLOC-STATS").starts_with("txt:\"Allocator: mimalloc."));
        assert_eq!(harness.run("MEMORY foo"), "-ERR unknown subcommand 'foo'. Try MEMORY HELP.");
        assert_eq!(harness.run("MEMORY STATS x"), "-ERR wrong number of arguments for 'memory|stats' command");
    }
}
