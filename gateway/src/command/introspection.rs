//! COMMAND: the command table as clients may read it. Internal rows are invisible everywhere.

use super::container::unknown_subcommand;
use super::pattern;
use super::{Context, Next};
use vasto_proto::command::table::{Command, find, find_subcommand};
use vasto_proto::command::{Args, CommandSpec, Flags, Keys, Merge, ReplyWriter, Route};
use vasto_proto::error::{self, CommandError};

/// Rows that clients see, subcommands left out.
fn visible() -> impl Iterator<Item = &'static CommandSpec> {
    Command::all().map(Command::spec).filter(|spec| !spec.flags.contains(Flags::INTERNAL) && !spec.name.contains('|'))
}

fn subcommands(spec: &CommandSpec) -> Vec<&'static CommandSpec> {
    if spec.flags.contains(Flags::CONTAINER) {
        Command::subcommands(spec.name).map(Command::spec).collect()
    } else {
        Vec::new()
    }
}

/// The row of a name, a subcommand as `container|word`.
fn find_visible(name: &[u8]) -> Option<&'static CommandSpec> {
    find(name).map(Command::spec).filter(|spec| !spec.flags.contains(Flags::INTERNAL))
}

/// The categories of Redis's access lists, in its order: from the flags, the group, and what Redis says of single commands.
fn categories(spec: &CommandSpec) -> Vec<&'static str> {
    let has = |flag| spec.flags.contains(flag);
    let container = has(Flags::CONTAINER);
    let is_command = spec.name == "command" || spec.name.starts_with("command|");
    let of_connection = spec.group == "connection" && !container || is_command || spec.name == "wait";
    let of_keyspace = spec.group == "generic" && !container && spec.name != "wait"
        || matches!(spec.name, "dbsize" | "flushdb" | "flushall" | "swapdb");
    let dangerous = has(Flags::ADMIN)
        || matches!(spec.name, "keys" | "flushdb" | "flushall" | "info" | "restore" | "lastsave" | "role" | "swapdb");
    [
        (of_keyspace, "keyspace"),
        (has(Flags::READONLY), "read"),
        (has(Flags::WRITE), "write"),
        (spec.group == "string", "string"),
        (has(Flags::PUBSUB), "pubsub"),
        (has(Flags::ADMIN) || matches!(spec.name, "lastsave" | "role"), "admin"),
        (has(Flags::FAST), "fast"),
        (!has(Flags::FAST), "slow"),
        (has(Flags::BLOCKING), "blocking"),
        (dangerous, "dangerous"),
        (of_connection, "connection"),
        (spec.group == "transactions", "transaction"),
    ]
    .into_iter()
    .filter_map(|(is_in, category)| is_in.then_some(category))
    .collect()
}

/// Categories that Redis knows; a row of another is never found.
fn is_in_category(spec: &CommandSpec, category: &[u8]) -> bool {
    categories(spec).iter().any(|own| own.as_bytes().eq_ignore_ascii_case(category))
}

/// Advice for clients that split commands over nodes themselves, as Redis gives it.
fn tips(spec: &CommandSpec) -> &'static [&'static str] {
    match spec.name {
        "mget" => &["request_policy:multi_shard"],
        "mset" => &["request_policy:multi_shard", "response_policy:all_succeeded"],
        "msetnx" => &["request_policy:multi_shard", "response_policy:agg_min"],
        "del" | "unlink" | "exists" | "touch" => &["request_policy:multi_shard", "response_policy:agg_sum"],
        "dbsize" => &["request_policy:all_shards", "response_policy:agg_sum"],
        "flushdb" | "flushall" | "ping" | "memory|purge" => {
            &["request_policy:all_shards", "response_policy:all_succeeded"]
        }
        "keys" => &["request_policy:all_shards", "nondeterministic_output_order"],
        "randomkey" => &["request_policy:all_shards", "nondeterministic_output"],
        "scan" => &["nondeterministic_output", "request_policy:special"],
        "ttl" | "pttl" | "object|encoding" | "object|refcount" | "object|idletime" | "object|freq" | "client|info"
        | "client|list" | "time" | "dump" | "lastsave" => &["nondeterministic_output"],
        "command" | "command|info" | "command|docs" | "command|list" => &["nondeterministic_output_order"],
        "config|set" => &["request_policy:all_nodes", "response_policy:all_succeeded"],
        "info" | "memory|doctor" => {
            &["nondeterministic_output", "request_policy:all_shards", "response_policy:special"]
        }
        "slowlog|get" => &["request_policy:all_nodes", "nondeterministic_output"],
        "slowlog|len" => &["request_policy:all_nodes", "response_policy:agg_sum", "nondeterministic_output"],
        "slowlog|reset" => &["request_policy:all_nodes", "response_policy:all_succeeded"],
        "wait" => &["request_policy:all_shards", "response_policy:agg_min"],
        _ => &[],
    }
}

/// One place where keys stand, and what the command does with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct KeySpec {
    first: i16,
    /// Counted from the first one; negative = from the end.
    last: i16,
    step: i16,
    flags: &'static [&'static str],
    notes: Option<&'static str>,
}

fn key_flags(name: &str) -> &'static [&'static str] {
    match name {
        "strlen" | "exists" | "touch" | "type" | "watch" | "memory|usage" => &["RO"],
        "object|encoding" | "object|refcount" | "object|idletime" | "object|freq" | "object|eventtime" => &["RO"],
        "set" => &["RW", "access", "update", "variable_flags"],
        "setnx" | "msetnx" => &["OW", "insert"],
        "setex" | "psetex" | "mset" | "restore" => &["OW", "update"],
        "getset" | "getex" | "incr" | "decr" | "incrby" | "decrby" | "incrbyfloat" => &["RW", "access", "update"],
        "getdel" => &["RW", "access", "delete"],
        "append" => &["RW", "insert"],
        "setrange" | "expire" | "pexpire" | "expireat" | "pexpireat" | "persist" => &["RW", "update"],
        "del" | "unlink" => &["RM", "delete"],
        // What reads a value and what is new and not named here.
        _ => &["RO", "access"],
    }
}

fn key_specs(spec: &CommandSpec) -> Vec<KeySpec> {
    let Keys { first, last, step } = spec.keys;
    let single = |first, flags| KeySpec { first, last: 0, step: 1, flags, notes: None };
    let moved: &[&str] = &["RW", "access", "delete"];
    match spec.name {
        _ if first == 0 => Vec::new(),
        "rename" => vec![single(1, moved), single(2, &["OW", "update"])],
        "renamenx" => vec![single(1, moved), single(2, &["OW", "insert"])],
        "copy" => vec![single(1, &["RO", "access"]), single(2, &["OW", "update"])],
        name => {
            let notes = match name {
                "set" => Some("RW and ACCESS due to the optional `GET` argument"),
                "getex" => Some("RW and UPDATE because it changes the TTL"),
                _ => None,
            };
            let last = if last < 0 { last } else { last - first };
            vec![KeySpec { first, last, step, flags: key_flags(name), notes }]
        }
    }
}

fn simple_set<'a>(reply: &mut ReplyWriter<'_>, prefix: &str, words: impl ExactSizeIterator<Item = &'a &'a str>) {
    reply.set(words.len());
    words.for_each(|word| reply.simple(&format!("{prefix}{word}")));
}

/// A description as COMMAND INFO gives it.
fn describe(reply: &mut ReplyWriter<'_>, spec: &CommandSpec) {
    reply.array(10);
    reply.bulk(spec.name.as_bytes());
    reply.integer(i64::from(spec.arity));
    let flags: Vec<&str> = Flags::ALL
        .iter()
        .filter(|(flag, name)| !name.is_empty() && spec.flags.contains(*flag))
        .map(|(_, name)| *name)
        .collect();
    simple_set(reply, "", flags.iter());
    for number in [spec.keys.first, spec.keys.last, spec.keys.step] {
        reply.integer(i64::from(number));
    }
    simple_set(reply, "@", categories(spec).iter());
    let tips = tips(spec);
    reply.set(tips.len());
    tips.iter().for_each(|tip| reply.bulk(tip.as_bytes()));
    let key_specs = key_specs(spec);
    reply.set(key_specs.len());
    key_specs.iter().for_each(|key_spec| describe_keys(reply, key_spec));
    let subcommands = subcommands(spec);
    reply.set(subcommands.len());
    subcommands.iter().for_each(|sub| describe(reply, sub));
}

fn describe_keys(reply: &mut ReplyWriter<'_>, keys: &KeySpec) {
    reply.map(3 + usize::from(keys.notes.is_some()));
    if let Some(notes) = keys.notes {
        reply.bulk(b"notes");
        reply.bulk(notes.as_bytes());
    }
    reply.bulk(b"flags");
    simple_set(reply, "", keys.flags.iter());
    for (name, kind, fields) in [
        ("begin_search", "index", &[("index", keys.first)][..]),
        ("find_keys", "range", &[("lastkey", keys.last), ("keystep", keys.step), ("limit", 0)][..]),
    ] {
        reply.bulk(name.as_bytes());
        reply.map(2);
        reply.bulk(b"type");
        reply.bulk(kind.as_bytes());
        reply.bulk(b"spec");
        reply.map(fields.len());
        for (field, number) in fields {
            reply.bulk(field.as_bytes());
            reply.integer(i64::from(*number));
        }
    }
}

pub fn command(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    if let Some(word) = args.next() {
        return Err(unknown_subcommand("command", word));
    }
    describe_all(context);
    Ok(Next::Replied)
}

fn describe_all(context: &mut Context<'_>) {
    let specs: Vec<_> = visible().collect();
    let mut reply = context.reply();
    reply.array(specs.len());
    specs.iter().for_each(|spec| describe(&mut reply, spec));
}

pub fn count(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    context.reply().integer(i64::try_from(visible().count()).expect("a short table"));
    Ok(Next::Replied)
}

pub fn info(context: &mut Context<'_>, args: Args<'_>) -> Result<Next, CommandError> {
    if args.is_empty() {
        describe_all(context);
        return Ok(Next::Replied);
    }
    let mut reply = context.reply();
    reply.array(args.len());
    for name in args {
        match find_visible(name) {
            Some(spec) => describe(&mut reply, spec),
            None => reply.null(),
        }
    }
    Ok(Next::Replied)
}

pub fn docs(context: &mut Context<'_>, args: Args<'_>) -> Result<Next, CommandError> {
    let specs: Vec<&CommandSpec> =
        if args.is_empty() { visible().collect() } else { args.filter_map(find_visible).collect() };
    let mut reply = context.reply();
    reply.map(specs.len());
    for spec in specs {
        document(&mut reply, spec);
    }
    Ok(Next::Replied)
}

/// A name and its documentation.
fn document(reply: &mut ReplyWriter<'_>, spec: &CommandSpec) {
    let subcommands = subcommands(spec);
    reply.bulk(spec.name.as_bytes());
    reply.map(4 + usize::from(!subcommands.is_empty()));
    for (field, text) in
        [("summary", spec.summary), ("since", spec.since), ("group", spec.group), ("complexity", complexity(spec))]
    {
        reply.bulk(field.as_bytes());
        reply.bulk(text.as_bytes());
    }
    if !subcommands.is_empty() {
        reply.bulk(b"subcommands");
        reply.map(subcommands.len());
        subcommands.iter().for_each(|sub| document(reply, sub));
    }
}

fn complexity(spec: &CommandSpec) -> &'static str {
    if spec.flags.contains(Flags::CONTAINER) && !subcommands(spec).is_empty() {
        return "Depends on subcommand.";
    }
    match (spec.name, spec.route) {
        ("lcs", _) => "O(N*M) where N and M are the lengths of the values",
        ("scan", _) => "O(1) for every call, O(N) for a whole walk over N keys",
        ("flushdb" | "flushall", _) => "O(1) for each shard",
        ("randomkey", _) => "O(1) for each shard",
        (_, Route::Split(Merge::InKeyOrder | Merge::Sum | Merge::AllOk | Merge::Concat | Merge::AnyNonNull)) => {
            "O(N) where N is the number of keys"
        }
        (_, Route::AllShards(_) | Route::AllKeyspaces(_)) => "O(N) where N is the number of keys of the keyspace",
        ("msetnx", _) => "O(N) where N is the number of keys",
        ("append" | "getrange" | "substr" | "setrange" | "dump" | "restore", _) => {
            "O(N) where N is the length of the value"
        }
        (_, Route::OneShard | Route::Here) => "O(1)",
    }
}

/// What COMMAND LIST leaves out.
enum Filter<'a> {
    None,
    Module,
    Category(&'a [u8]),
    Pattern(&'a [u8]),
}

pub fn list(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let mut filter = Filter::None;
    if !args.is_empty() {
        if !(args.option("filterby") && args.len() == 2) {
            return Err(error::SYNTAX);
        }
        let kind = args.bytes()?;
        let wanted = args.bytes()?;
        filter = match kind.to_ascii_lowercase().as_slice() {
            b"module" => Filter::Module,
            b"aclcat" => Filter::Category(wanted),
            b"pattern" => Filter::Pattern(wanted),
            _ => return Err(error::SYNTAX),
        };
    }
    let fits = |spec: &&CommandSpec| match filter {
        Filter::None => true,
        // No command comes from a module.
        Filter::Module => false,
        Filter::Category(category) => is_in_category(spec, category),
        Filter::Pattern(wanted) => pattern::matches_in_any_case(wanted, spec.name.as_bytes()),
    };
    let with_subcommands = visible().flat_map(|spec| std::iter::once(spec).chain(subcommands(spec)));
    let names: Vec<&str> = with_subcommands.filter(fits).map(|spec| spec.name).collect();
    let mut reply = context.reply();
    reply.array(names.len());
    names.iter().for_each(|name| reply.bulk(name.as_bytes()));
    Ok(Next::Replied)
}

/// A key of a command line, and what the command does with it.
type KeyUse<'a> = (&'a [u8], &'static [&'static str]);

/// The keys of a command line.
fn keys_of_line<'a>(args: Args<'a>) -> Result<Vec<KeyUse<'a>>, CommandError> {
    const INVALID_COMMAND: CommandError = CommandError::fixed("ERR Invalid command specified");
    let words: Vec<&[u8]> = args.collect();
    let mut spec = words.first().and_then(|name| find_visible(name)).ok_or(INVALID_COMMAND)?;
    if spec.flags.contains(Flags::CONTAINER) && words.len() > 1 {
        spec = find_subcommand(spec, words[1]).map(Command::spec).ok_or(INVALID_COMMAND)?;
    }
    if spec.keys == Keys::NONE {
        return Err(CommandError::fixed("ERR The command has no key arguments"));
    }
    if !spec.accepts(words.len(), |place| words[place]) {
        return Err(CommandError::fixed("ERR Invalid number of arguments specified for command"));
    }
    let before_event_time = spec.words_before_event_time(words.len(), |place| words[place]);
    let specs = key_specs(spec);
    // The one command here whose use of its key depends on its options.
    let set_reads = words[1..].iter().skip(2).any(|word| word.eq_ignore_ascii_case(b"get"));
    let flags = |place: usize| {
        if spec.name == "set" {
            return if set_reads { &["RW", "access", "update"][..] } else { &["OW", "update"][..] };
        }
        let own = specs.iter().rev().find(|keys| usize::try_from(keys.first).is_ok_and(|first| first <= place));
        own.map_or(&[][..], |keys| keys.flags)
    };
    Ok(spec.key_positions(before_event_time).map(|place| (words[place], flags(place))).collect())
}

pub fn getkeys(context: &mut Context<'_>, args: Args<'_>) -> Result<Next, CommandError> {
    let keys = keys_of_line(args)?;
    let mut reply = context.reply();
    reply.array(keys.len());
    keys.iter().for_each(|(key, _)| reply.bulk(key));
    Ok(Next::Replied)
}

pub fn getkeysandflags(context: &mut Context<'_>, args: Args<'_>) -> Result<Next, CommandError> {
    let keys = keys_of_line(args)?;
    let mut reply = context.reply();
    reply.array(keys.len());
    for (key, flags) in keys {
        reply.array(2);
        reply.bulk(key);
        simple_set(&mut reply, "", flags.iter());
    }
    Ok(Next::Replied)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::harness::Harness;

    #[test]
    fn answers_are_those_of_redis() {
        Harness::new().script(
            r#"
            > COMMAND foo / < -ERR unknown subcommand 'foo'. Try COMMAND HELP.
            > COMMAND COUNT a / < -ERR wrong number of arguments for 'command|count' command
            > COMMAND INFO get nosuch _exec / < [["get", 2, ~[+readonly, +fast], 1, 1, 1, ~[+@read, +@string, +@fast], ~[], ~[{"flags": ~[+RO, +access], "begin_search": {"type": "index", "spec": {"index": 1}}, "find_keys": {"type": "range", "spec": {"lastkey": 0, "keystep": 1, "limit": 0}}}], ~[]], null, null]
            > COMMAND INFO client|id / < [["client|id", 2, ~[+noscript, +loading, +stale], 0, 0, 0, ~[+@slow, +@connection], ~[], ~[], ~[]]]
            > COMMAND GETKEYS get a b / < -ERR Invalid number of arguments specified for command
            > COMMAND GETKEYS nosuch a / < -ERR Invalid command specified
            > COMMAND GETKEYS _watch a / < -ERR Invalid command specified
            > COMMAND GETKEYS ping a / < -ERR The command has no key arguments
            > COMMAND GETKEYS mset a b c d / < ["a", "c"]
            > COMMAND GETKEYS object encoding k / < ["k"]
            > COMMAND GETKEYS del a EVENTTIME 5 / < ["a"]
            > COMMAND GETKEYS del a EVENTTIME b / < ["a", "EVENTTIME", "b"]
            > COMMAND GETKEYS setex a 1 v EVENTTIME 5 / < ["a"]
            > COMMAND GETKEYS object eventtime k / < ["k"]
            > COMMAND GETKEYS client foo / < -ERR Invalid command specified
            > COMMAND GETKEYSANDFLAGS mset a b c d / < [["a", ~[+OW, +update]], ["c", ~[+OW, +update]]]
            > COMMAND GETKEYSANDFLAGS set a b / < [["a", ~[+OW, +update]]]
            > COMMAND GETKEYSANDFLAGS set a b GET / < [["a", ~[+RW, +access, +update]]]
            > COMMAND GETKEYSANDFLAGS copy a b / < [["a", ~[+RO, +access]], ["b", ~[+OW, +update]]]
            > COMMAND LIST filterby / < -ERR syntax error
            > COMMAND LIST filterby foo bar / < -ERR syntax error
            > COMMAND LIST filterby pattern client|g* / < ["client|getname"]
            > COMMAND LIST filterby aclcat nosuch / < []
            > COMMAND LIST filterby aclcat transaction / < ["multi", "exec", "discard", "watch", "unwatch"]
            > COMMAND LIST filterby module foo / < []
            > COMMAND DOCS nosuch / < {}
            > COMMAND DOCS unwatch / < {"unwatch": {"summary": "Forgets the watched keys.", "since": "2.2.0", "group": "transactions", "complexity": "O(1)"}}
            "#,
        );
    }

    #[test]
    fn internal_rows_are_invisible() {
        let mut harness = Harness::new();
        let count: usize = harness.run("COMMAND COUNT").parse().expect("a number");
        assert_eq!(count, visible().count());
        for line in ["COMMAND", "COMMAND DOCS", "COMMAND LIST", "COMMAND INFO"] {
            let reply = harness.run(line);
            assert!(reply.contains("\"get\"") && reply.contains("\"client|kill\""), "{line}");
            assert!(!reply.contains("\"_"), "{line}");
        }
    }
}
