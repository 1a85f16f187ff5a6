//! Random sequences of commands, sent to redis-server and to ours: every answer must be the same, byte for byte.
//!
//! `VASTO_SEED` repeats a run, `VASTO_STEPS` sets how many commands are sent (else a time is). A sequence
//! that answers differently is shortened before it is shown.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{Duration, Instant};

use fastrand::Rng;
use redis_tests::connection::shown;
use redis_tests::seed::{number_from_environment, seeded};
use redis_tests::{Address, Cluster, Connection, RedisServer, Server, Value, heavy, notation, payload, resp};

use crate::known_differences::{Comparison, alike, comparison};

type Command = Vec<Vec<u8>>;

/// So long a run takes where `VASTO_STEPS` does not say how many commands it has.
const RUN_TIME: Duration = Duration::from_secs(45);

/// Commands of one episode: each begins with an empty keyspace and is repeated alone to shorten it.
const EPISODE_COMMANDS: usize = 250;

/// Connections that take turns: two of RESP2, one of RESP3, and one for what is compared as a whole.
const CONNECTIONS: usize = 4;
const WHOLE: usize = CONNECTIONS - 1;

/// An episode is shortened by at most so many repetitions, and for so long.
const REPETITIONS_MAX: usize = 400;
const SHORTENING_TIME: Duration = Duration::from_secs(20);

/// No answer takes so long, even on a busy machine.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

#[test]
fn one_shard_answers_as_redis_server_does() {
    let _turn = heavy();
    let redis = RedisServer::start();
    let server = Server::start_with(&["--databases", "1"]);
    run("one_shard", Reach::Everything, &redis, &[server.address()]);
}

#[test]
fn many_shards_answer_as_redis_server_does() {
    let _turn = heavy();
    let redis = RedisServer::start();
    let cluster = Cluster::builder().stores(3).gateways(2).shards(7).gateway_option("--databases", "1").start();
    run("many_shards", Reach::OneTagWhereNeeded, &redis, &[cluster.address(0), cluster.address(1)]);
}

/// The generator and the comparison themselves: redis-server against another one must show no difference.
#[test]
fn redis_server_answers_as_redis_server_does() {
    let redis = RedisServer::start();
    let other = RedisServer::start();
    let start = seeded("differential of redis_server").seed;
    for episode in 0..20 {
        if let Err(found) = check_episode(start + episode, Reach::Everything, &redis, &[other.address()]) {
            panic!("{}", found.explain(&redis, &[other.address()]));
        }
    }
}

/// Differences that one run explains, each of another command: enough to work on.
const EXPLAINED_MAX: usize = 12;

fn run(name: &str, reach: Reach, redis: &RedisServer, ours: &[Address]) {
    let start = seeded(&format!("differential of {name}")).seed;
    let steps: Option<usize> = number_from_environment("VASTO_STEPS");
    let begin = Instant::now();
    let mut commands = 0;
    let mut explained: BTreeMap<String, String> = BTreeMap::new();
    let mut episode = 0;
    while explained.len() < EXPLAINED_MAX
        && match steps {
            Some(steps) => commands < steps,
            None => begin.elapsed() < RUN_TIME,
        }
    {
        match check_episode(start + episode, reach, redis, ours) {
            Ok(count) => commands += count,
            Err(found) => {
                commands += EPISODE_COMMANDS;
                let subject = found.difference.subject.clone();
                explained.entry(subject).or_insert_with(|| found.explain(redis, ours));
            }
        }
        episode += 1;
    }
    eprintln!("{name}: {commands} commands in {:?}", begin.elapsed());
    let texts: Vec<&str> = explained.values().map(String::as_str).collect();
    assert!(texts.is_empty(), "{} commands answer differently:\n\n{}", texts.len(), texts.join("\n"));
}

/// An episode that was answered differently.
struct Found {
    seed: u64,
    episode: Vec<Step>,
    difference: Difference,
}

/// Runs one episode; the number of its commands.
fn check_episode(seed: u64, reach: Reach, redis: &RedisServer, ours: &[Address]) -> Result<usize, Found> {
    let episode = Generator::new(seed, reach).episode();
    match play(&episode, &[redis.address()], ours) {
        Ok(()) => Ok(episode.iter().map(Step::command_count).sum()),
        Err(difference) => Err(Found { seed, episode, difference }),
    }
}

impl Found {
    /// Shortens the episode and shows what is left of it.
    fn explain(self, redis: &RedisServer, ours: &[Address]) -> String {
        let (short, difference) = shorten(self.episode, self.difference, &[redis.address()], ours);
        let lines: Vec<String> = short.iter().map(Step::to_string).collect();
        format!(
            "{}\nafter, in an empty keyspace (VASTO_SEED={} VASTO_STEPS=1 repeats it):\n{}\n",
            difference.text,
            self.seed,
            lines.join("\n")
        )
    }
}

/// What may be asked of ours.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    Everything,
    /// Commands that ours runs within one shard only get keys of one hash tag.
    OneTagWhereNeeded,
}

#[derive(Clone, Debug)]
enum Step {
    /// Sent in one packet.
    Pipeline { connection: usize, form: Form, commands: Vec<Command> },
    /// All keys that a walk with SCAN finds.
    Walk { options: Command },
    /// DBSIZE, when all that has expired was noticed.
    Size,
    /// RANDOMKEY names a key that is there.
    RandomKey,
}

/// How commands are written on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Arrays,
    Lines,
}

impl Step {
    fn command_count(&self) -> usize {
        match self {
            Step::Pipeline { commands, .. } => commands.len(),
            Step::Walk { .. } | Step::Size | Step::RandomKey => 1,
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Pipeline { connection, form, commands } => {
                let form = if *form == Form::Lines { " (as lines)" } else { "" };
                let commands: Vec<String> = commands.iter().map(|command| shown(command)).collect();
                write!(formatter, "{connection}>{form} {}", commands.join("  |  "))
            }
            Step::Walk { options } => write!(formatter, "walk with SCAN {}", shown(options)),
            Step::Size => write!(formatter, "DBSIZE"),
            Step::RandomKey => write!(formatter, "RANDOMKEY"),
        }
    }
}

// Playing an episode.

struct Difference {
    step: usize,
    /// What differs, the same for differences of one cause: the words of the command.
    subject: String,
    text: String,
}

/// One connection to each side, and what is queued in its transaction.
struct Pair {
    theirs: Connection,
    ours: Connection,
    queued: Vec<Comparison>,
}

fn open(number: usize, theirs: &[Address], ours: &[Address]) -> Pair {
    let mut pair = Pair {
        theirs: Connection::open(&theirs[number % theirs.len()]),
        ours: Connection::open(&ours[number % ours.len()]),
        queued: Vec::new(),
    };
    for connection in [&mut pair.theirs, &mut pair.ours] {
        connection.set_reply_timeout(ANSWER_TIMEOUT).expect("the socket is open");
    }
    if number == 2 {
        for connection in [&mut pair.theirs, &mut pair.ours] {
            connection.done(&["HELLO", "3"]);
        }
    }
    pair
}

fn play(episode: &[Step], theirs: &[Address], ours: &[Address]) -> Result<(), Difference> {
    let mut pairs: Vec<Pair> = (0..CONNECTIONS).map(|number| open(number, theirs, ours)).collect();
    let whole = &mut pairs[WHOLE];
    for connection in [&mut whole.theirs, &mut whole.ours] {
        connection.done(&["FLUSHALL"]);
        connection.done(&["CONFIG", "SET", "slowlog-max-len", "128"]);
    }
    for (index, step) in episode.iter().enumerate() {
        let result = match step {
            Step::Pipeline { connection, form, commands } => {
                play_pipeline(*connection, *form, commands, &mut pairs[*connection], theirs, ours)
            }
            Step::Walk { options } => play_walk(options, &mut pairs[WHOLE]),
            Step::Size => play_size(&mut pairs[WHOLE]),
            Step::RandomKey => play_random_key(&mut pairs[WHOLE]),
        };
        result.map_err(|text| Difference { step: index, subject: subject(&text), text })?;
    }
    Ok(())
}

/// The first line of the text names the command; its first word, and the second of a command with subcommands.
fn subject(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    let command = line.split_once(": ").map_or(line, |(_, command)| command);
    let words: Vec<String> = command.split_whitespace().map(str::to_ascii_uppercase).collect();
    let containers = ["CLIENT", "COMMAND", "CONFIG", "OBJECT", "SLOWLOG", "MEMORY"];
    match words.as_slice() {
        [name, sub, ..] if containers.contains(&name.as_str()) => format!("{name} {sub}"),
        [name, ..] => name.clone(),
        [] => String::new(),
    }
}

fn encode(form: Form, command: &Command) -> Vec<u8> {
    match form {
        Form::Arrays => resp::command(command),
        Form::Lines => {
            let words: Vec<String> = command.iter().map(|word| notation::quote(word)).collect();
            format!("{}\r\n", words.join(" ")).into_bytes()
        }
    }
}

fn play_pipeline(
    number: usize,
    form: Form,
    commands: &[Command],
    pair: &mut Pair,
    theirs: &[Address],
    ours: &[Address],
) -> Result<(), String> {
    let packet: Vec<u8> = commands.iter().flat_map(|command| encode(form, command)).collect();
    for connection in [&mut pair.theirs, &mut pair.ours] {
        connection.send(&packet).map_err(|error| error.to_string())?;
    }
    for (index, command) in commands.iter().enumerate() {
        let expected = pair
            .theirs
            .read_raw()
            .map_err(|error| format!("redis-server does not answer command {index}, {}: {error}", shown(command)))?;
        let got = pair
            .ours
            .read_raw()
            .map_err(|error| format!("ours does not answer command {index}, {}: {error}", shown(command)))?;
        compare(command, &expected, &got, &mut pair.queued).map_err(|()| {
            format!(
                "command {index} of the step: {}\nredis-server: {}\nours:         {}",
                shown(command),
                shortened(&expected),
                shortened(&got)
            )
        })?;
        if is_named(command, "QUIT") {
            for (whose, connection) in [("redis-server", &mut pair.theirs), ("ours", &mut pair.ours)] {
                if !connection.is_closed_within(Duration::from_secs(10)) {
                    return Err(format!("{whose} does not close after {}", shown(command)));
                }
            }
            *pair = open(number, theirs, ours);
            break;
        }
    }
    Ok(())
}

fn is_named(command: &[Vec<u8>], name: &str) -> bool {
    command.first().is_some_and(|word| word.eq_ignore_ascii_case(name.as_bytes()))
}

fn shortened(raw: &[u8]) -> String {
    let text = raw.escape_ascii().to_string();
    if text.len() > 600 { format!("{}...({} bytes)", &text[..600], raw.len()) } else { text }
}

fn compare(command: &[Vec<u8>], expected: &[u8], got: &[u8], queued: &mut Vec<Comparison>) -> Result<(), ()> {
    let at_exec = if is_named(command, "EXEC") || is_named(command, "DISCARD") || is_named(command, "RESET") {
        // A refused EXEC, as one of wrong arity, leaves the transaction open.
        if expected.starts_with(b"-ERR wrong number") { Vec::new() } else { std::mem::take(queued) }
    } else {
        Vec::new()
    };
    if expected == b"+QUEUED\r\n" {
        queued.push(comparison(command));
    }
    if expected == got {
        return Ok(());
    }
    let (Ok(expected), Ok(got)) = (resp::parse(expected), resp::parse(got)) else {
        return Err(());
    };
    let same = match (&expected, &got) {
        (Value::Array(expected), Value::Array(got)) if is_named(command, "EXEC") => {
            expected.len() == got.len()
                && expected.len() == at_exec.len()
                && expected
                    .iter()
                    .zip(got)
                    .zip(at_exec)
                    .all(|((expected, got), comparison)| alike(comparison, expected, got))
        }
        _ => alike(comparison(command), &expected, &got),
    };
    if same { Ok(()) } else { Err(()) }
}

/// All keys of a walk, or the error that it answers.
fn walk(connection: &mut Connection, options: &Command) -> Result<BTreeSet<Vec<u8>>, String> {
    let mut keys = BTreeSet::new();
    let mut cursor = b"0".to_vec();
    // A walk of a few keys has few pages; ours has at least one a shard.
    for _ in 0..100_000 {
        let mut command = vec![b"SCAN".to_vec(), cursor];
        command.extend_from_slice(options);
        let reply = connection.try_call(&command).map_err(|error| error.to_string())?;
        if reply.is_error() {
            return Err(reply.text());
        }
        let page = reply.elements().unwrap_or_default();
        let [next, found] = page.as_slice() else {
            return Err(format!("no page: {}", notation::format(&reply)));
        };
        for key in found.elements().unwrap_or_default() {
            keys.insert(key.bytes().unwrap_or_default().to_vec());
        }
        cursor = next.bytes().unwrap_or_default().to_vec();
        if cursor == b"0" {
            return Ok(keys);
        }
    }
    Err("the walk does not end".to_owned())
}

fn play_walk(options: &Command, pair: &mut Pair) -> Result<(), String> {
    let expected = walk(&mut pair.theirs, options);
    let got = walk(&mut pair.ours, options);
    if expected == got {
        return Ok(());
    }
    let show = |walk: &Result<BTreeSet<Vec<u8>>, String>| match walk {
        Ok(keys) => {
            let keys: Vec<String> = keys.iter().map(|key| notation::quote(key)).collect();
            keys.join(" ")
        }
        Err(error) => format!("error {error}"),
    };
    Err(format!("a walk with SCAN {}\nredis-server: {}\nours:         {}", shown(options), show(&expected), show(&got)))
}

/// Makes redis-server notice what has expired, which it counts until then; gives the keys that are left.
fn notice_expired(pair: &mut Pair) -> BTreeSet<Vec<u8>> {
    let mut command = vec![b"EXISTS".to_vec()];
    command.extend(all_keys());
    for connection in [&mut pair.theirs, &mut pair.ours] {
        connection.call(&command);
    }
    walk(&mut pair.theirs, &Vec::new()).unwrap_or_default()
}

fn play_size(pair: &mut Pair) -> Result<(), String> {
    notice_expired(pair);
    let expected = pair.theirs.call(&["DBSIZE"]);
    let got = pair.ours.call(&["DBSIZE"]);
    if expected == got {
        return Ok(());
    }
    Err(format!("DBSIZE\nredis-server: {}\nours:         {}", expected.text(), got.text()))
}

fn play_random_key(pair: &mut Pair) -> Result<(), String> {
    let keys = notice_expired(pair);
    let got = pair.ours.call(&["RANDOMKEY"]);
    let right = match &got {
        Value::Bulk(key) => keys.contains(key),
        Value::Nil => keys.is_empty(),
        _ => false,
    };
    if right {
        return Ok(());
    }
    Err(format!(
        "RANDOMKEY answers {}; the keys are {}",
        notation::format(&got),
        shown(&keys.into_iter().collect::<Vec<_>>())
    ))
}

// Shortening.

/// Leaves out steps, then commands, as long as the answers still differ.
fn shorten(
    mut episode: Vec<Step>,
    mut difference: Difference,
    theirs: &[Address],
    ours: &[Address],
) -> (Vec<Step>, Difference) {
    episode.truncate(difference.step + 1);
    // One command a step, where that still shows the difference, so that each can be left out.
    let single: Vec<Step> = episode
        .iter()
        .flat_map(|step| match step {
            Step::Pipeline { connection, form, commands } => commands
                .iter()
                .map(|command| Step::Pipeline { connection: *connection, form: *form, commands: vec![command.clone()] })
                .collect(),
            other => vec![other.clone()],
        })
        .collect();
    if let Err(found) = play(&single, theirs, ours) {
        episode = single;
        episode.truncate(found.step + 1);
        difference = found;
    }
    let mut repetitions = 0;
    let begin = Instant::now();
    let mut chunk = episode.len() / 2;
    while chunk > 0 && repetitions < REPETITIONS_MAX && begin.elapsed() < SHORTENING_TIME {
        let mut start = 0;
        let mut found_any = false;
        // The last step shows the difference and stays.
        while start + 1 < episode.len() && repetitions < REPETITIONS_MAX && begin.elapsed() < SHORTENING_TIME {
            let end = (start + chunk).min(episode.len() - 1);
            let mut without = episode.clone();
            without.drain(start..end);
            repetitions += 1;
            match play(&without, theirs, ours) {
                Err(found) => {
                    without.truncate(found.step + 1);
                    episode = without;
                    difference = found;
                    found_any = true;
                }
                Ok(()) => start = end,
            }
        }
        if !found_any || chunk > 1 {
            chunk /= 2;
        }
    }
    (episode, difference)
}

// Making an episode.

/// What stands in one place of a command.
#[derive(Clone, Copy)]
enum Slot {
    Key,
    /// Some keys.
    Keys,
    /// Keys and values in turn.
    Pairs,
    Value,
    Integer,
    Float,
    /// A position in a text.
    Offset,
    /// A time to live, or odd: never one that ends while the episode runs.
    Seconds,
    Milliseconds,
    /// A time of day, long ago or far away.
    UnixSeconds,
    UnixMilliseconds,
    Pattern,
    Text,
    Word(&'static str),
    /// One of the words, or nothing.
    Maybe(&'static [&'static str]),
    SetOptions,
    GetExOptions,
    LcsOptions,
    CopyOptions,
    /// What DUMP may have answered, or nearly.
    Payload,
    /// Time to live, of which 0 means none.
    RestoreTime,
    RestoreOptions,
}

/// Whether ours runs the command within one shard only.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keyed {
    /// One key, or split by key.
    Free,
    OneShard,
    /// Asks all shards, or none.
    NoKey,
}

struct Row {
    weight: u32,
    name: &'static str,
    slots: &'static [Slot],
    keyed: Keyed,
}

const fn row(weight: u32, name: &'static str, slots: &'static [Slot], keyed: Keyed) -> Row {
    Row { weight, name, slots, keyed }
}

const EXPIRE_OPTIONS: &[&str] = &["NX", "XX", "GT", "LT", "nx", "Gt"];

/// All commands whose answers depend on nothing but the commands before. Not here, since an odd argument makes them
/// wait forever: WAIT, DEBUG SLEEP, CLIENT PAUSE; not here, since they change how answers come: CLIENT REPLY, CLIENT KILL, SHUTDOWN.
const ROWS: &[Row] = {
    use Keyed::{Free, NoKey, OneShard};
    use Slot::*;
    &[
        row(30, "GET", &[Key], Free),
        row(40, "SET", &[Key, Value, SetOptions], Free),
        row(6, "SETNX", &[Key, Value], Free),
        row(6, "SETEX", &[Key, Seconds, Value], Free),
        row(6, "PSETEX", &[Key, Milliseconds, Value], Free),
        row(6, "GETSET", &[Key, Value], Free),
        row(6, "GETDEL", &[Key], Free),
        row(12, "GETEX", &[Key, GetExOptions], Free),
        row(10, "MGET", &[Keys], Free),
        row(10, "MSET", &[Pairs], Free),
        row(6, "MSETNX", &[Pairs], OneShard),
        row(10, "APPEND", &[Key, Value], Free),
        row(6, "STRLEN", &[Key], Free),
        row(10, "GETRANGE", &[Key, Offset, Offset], Free),
        row(4, "SUBSTR", &[Key, Offset, Offset], Free),
        row(10, "SETRANGE", &[Key, Offset, Value], Free),
        row(10, "INCR", &[Key], Free),
        row(8, "DECR", &[Key], Free),
        row(10, "INCRBY", &[Key, Integer], Free),
        row(8, "DECRBY", &[Key, Integer], Free),
        row(14, "INCRBYFLOAT", &[Key, Float], Free),
        row(8, "LCS", &[Key, Key, LcsOptions], OneShard),
        row(8, "DEL", &[Keys], Free),
        row(4, "UNLINK", &[Keys], Free),
        row(6, "EXISTS", &[Keys], Free),
        row(4, "TOUCH", &[Keys], Free),
        row(5, "TYPE", &[Key], Free),
        row(8, "EXPIRE", &[Key, Seconds, Maybe(EXPIRE_OPTIONS)], Free),
        row(6, "PEXPIRE", &[Key, Milliseconds, Maybe(EXPIRE_OPTIONS)], Free),
        row(6, "EXPIREAT", &[Key, UnixSeconds, Maybe(EXPIRE_OPTIONS)], Free),
        row(6, "PEXPIREAT", &[Key, UnixMilliseconds, Maybe(EXPIRE_OPTIONS)], Free),
        row(3, "EXPIRE", &[Key, Seconds, Maybe(EXPIRE_OPTIONS), Maybe(EXPIRE_OPTIONS)], Free),
        row(6, "TTL", &[Key], Free),
        row(6, "PTTL", &[Key], Free),
        row(6, "EXPIRETIME", &[Key], Free),
        row(6, "PEXPIRETIME", &[Key], Free),
        row(6, "PERSIST", &[Key], Free),
        row(6, "RENAME", &[Key, Key], OneShard),
        row(6, "RENAMENX", &[Key, Key], OneShard),
        row(8, "COPY", &[Key, Key, CopyOptions], OneShard),
        row(10, "DUMP", &[Key], Free),
        row(14, "RESTORE", &[Key, RestoreTime, Payload, RestoreOptions], Free),
        row(4, "KEYS", &[Pattern], NoKey),
        row(1, "FLUSHDB", &[Maybe(&["ASYNC", "SYNC", "async"])], NoKey),
        row(1, "FLUSHALL", &[Maybe(&["ASYNC", "SYNC"])], NoKey),
        row(2, "OBJECT", &[Word("ENCODING"), Key], Free),
        row(1, "OBJECT", &[Word("REFCOUNT"), Key], Free),
        row(1, "OBJECT", &[Word("IDLETIME"), Key], Free),
        row(1, "OBJECT", &[Word("FREQ"), Key], Free),
        row(1, "OBJECT", &[Word("HELP")], NoKey),
        row(1, "MEMORY", &[Word("USAGE"), Key], Free),
        row(3, "PING", &[], NoKey),
        row(2, "PING", &[Text], NoKey),
        row(2, "ECHO", &[Text], NoKey),
        row(1, "SELECT", &[Integer], NoKey),
        row(2, "SELECT", &[Word("0")], NoKey),
        row(1, "HELLO", &[Maybe(&["2", "3", "4", "x"])], NoKey),
        row(1, "HELLO", &[Word("3"), Word("AUTH"), Word("default"), Text], NoKey),
        row(1, "HELLO", &[Word("2"), Word("SETNAME"), Text], NoKey),
        row(1, "AUTH", &[Text], NoKey),
        row(1, "AUTH", &[Word("default"), Text], NoKey),
        row(1, "RESET", &[], NoKey),
        row(1, "CLIENT", &[Word("SETNAME"), Text], NoKey),
        row(1, "CLIENT", &[Word("GETNAME")], NoKey),
        row(1, "CLIENT", &[Word("ID")], NoKey),
        row(1, "CLIENT", &[Word("NO-EVICT"), Maybe(&["ON", "off", "x"])], NoKey),
        row(1, "CLIENT", &[Word("UNPAUSE")], NoKey),
        row(1, "CLIENT", &[Text], NoKey),
        row(1, "COMMAND", &[Word("GETKEYS"), Word("MSET"), Pairs], NoKey),
        row(1, "COMMAND", &[Word("GETKEYS"), Text, Text], NoKey),
        row(1, "COMMAND", &[Word("GETKEYSANDFLAGS"), Word("set"), Text, Text], NoKey),
        row(1, "COMMAND", &[Word("LIST"), Word("FILTERBY"), Word("PATTERN"), Word("getde*")], NoKey),
        row(1, "CONFIG", &[Word("GET"), Word("slowlog-max-len")], NoKey),
        row(1, "CONFIG", &[Word("SET"), Word("slowlog-max-len"), Integer], NoKey),
        row(1, "CONFIG", &[Word("GET"), Text], NoKey),
        row(1, "CONFIG", &[Text, Text], NoKey),
        row(1, "SLOWLOG", &[Text], NoKey),
        row(1, "TIME", &[Text], NoKey),
        row(1, "DBSIZE", &[Text], NoKey),
        row(1, "RANDOMKEY", &[Text], NoKey),
        row(1, "SCAN", &[Text, Text], NoKey),
        row(1, "NOSUCHCOMMAND", &[Text, Value], NoKey),
        row(1, "QUITE", &[], NoKey),
    ]
};

/// Keys of several shards, and keys that are odd.
const PLAIN_KEYS: &[&[u8]] = &[
    b"a",
    b"b",
    b"c",
    b"d",
    b"k1",
    b"k2",
    b"",
    b"\x00\xff\r\n",
    b"with space",
    "schl\u{fc}ssel".as_bytes(),
    b"{}open",
    b"{u}x",
    b"{u}y",
    b"[x]*",
];

/// Keys of one hash tag.
const TAGGED_KEYS: &[&[u8]] = &[b"{t}a", b"{t}b", b"{t}c", b"{t}d", b"{t}", b"pre{t}\x00"];

fn long_key() -> Vec<u8> {
    b"long".repeat(200)
}

fn all_keys() -> Vec<Vec<u8>> {
    let mut keys: Vec<Vec<u8>> =
        PLAIN_KEYS.iter().chain(TAGGED_KEYS).map(|key| key.to_vec()).chain([long_key()]).collect();
    // A shifted argument may make a key of any other word.
    keys.extend(ODD.iter().map(|word| word.to_vec()));
    keys.extend(VALUES.iter().map(|word| word.to_vec()));
    keys
}

/// Arguments that fit nowhere. None of them is a time to live that ends within an episode.
const ODD: &[&[u8]] = &[
    b"",
    b" ",
    b"abc",
    b"nan",
    b"inf",
    b"-1",
    b"-0",
    b"0",
    b"+1",
    b"1.5",
    b"1e3",
    b"0x10",
    b"007",
    b" 1",
    b"1 ",
    b"9223372036854775807",
    b"9223372036854775808",
    b"-9223372036854775808",
    b"-9223372036854775809",
    b"18446744073709551616",
    b"NX",
    b"EX",
    b"GET",
    b"\x00",
    b"\r\n",
    b"\xff\xfe",
    b"*",
];

const VALUES: &[&[u8]] = &[
    b"",
    b"abc",
    b"hello world",
    b"0",
    b"1",
    b"-1",
    b"10",
    b"42",
    b"9223372036854775807",
    b"-9223372036854775808",
    b"9223372036854775806",
    b"1.5",
    b"-0.1",
    b"3.0e3",
    b"1e300",
    b"0.1",
    b" 7",
    b"7 ",
    b"+7",
    b"07",
    b"nan",
    b"inf",
    b"\x00\x01\xff\r\n",
    b"a long value of more than forty-four characters, so that it is raw",
];

const FLOATS: &[&[u8]] = &[
    b"0",
    b"1",
    b"-1",
    b"0.1",
    b"0.2",
    b"1.5",
    b"-2.75",
    b"1e3",
    b"1e-5",
    b"3.14159265358979",
    b"100000000000",
    b"1e17",
    b"1e18",
    b"-1e18",
    b"0.000000000000001",
    b"1e300",
    b"-1e300",
    b"nan",
    b"inf",
    b"-inf",
    b"1e5000",
    b"0x1p3",
    b".5",
    b"5.",
    b"1e",
    b"--1",
];

const PATTERNS: &[&[u8]] = &[
    b"*",
    b"?",
    b"a",
    b"a*",
    b"{t}*",
    b"{t}?",
    b"*t*",
    b"[abc]",
    b"[^a]",
    b"[a-c]",
    b"k[0-9]",
    b"k?",
    b"long*",
    b"\\[x\\]\\*",
    b"",
    b"**",
    b"[",
    b"with*",
    b"pre*",
    b"{u}[xy]",
];

struct Generator {
    random: Rng,
    reach: Reach,
    weights: u32,
}

impl Generator {
    fn new(seed: u64, reach: Reach) -> Generator {
        Generator { random: Rng::with_seed(seed), reach, weights: ROWS.iter().map(|row| row.weight).sum() }
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.random.u32(..100) < percent
    }

    fn one(&mut self, words: &[&[u8]]) -> Vec<u8> {
        words[self.random.usize(..words.len())].to_vec()
    }

    fn episode(&mut self) -> Vec<Step> {
        let mut steps = Vec::new();
        let mut commands = 0;
        while commands < EPISODE_COMMANDS {
            let step = self.step();
            commands += step.command_count();
            steps.push(step);
        }
        // Whatever happened, the two keyspaces must be the same in the end.
        steps.push(Step::Walk { options: Vec::new() });
        steps.push(Step::Size);
        steps
    }

    fn step(&mut self) -> Step {
        match self.random.u32(..100) {
            0..2 => Step::Walk { options: self.scan_options() },
            2..4 => Step::Size,
            4 => Step::RandomKey,
            _ => {
                let connection = self.random.usize(..WHOLE);
                let commands = if self.chance(12) {
                    self.transaction()
                } else {
                    let length = 1 + self.random.usize(..12);
                    let mut commands: Vec<Command> = (0..length).map(|_| self.command()).collect();
                    if self.chance(1) {
                        commands.push(vec![b"QUIT".to_vec()]);
                    }
                    commands
                };
                // An empty name cannot be told from an empty line.
                let lines = self.chance(8) && commands.iter().all(|command| !command[0].is_empty());
                Step::Pipeline { connection, form: if lines { Form::Lines } else { Form::Arrays }, commands }
            }
        }
    }

    fn scan_options(&mut self) -> Command {
        let mut options = Vec::new();
        if self.chance(50) {
            options.extend([b"MATCH".to_vec(), self.one(PATTERNS)]);
        }
        if self.chance(50) {
            options.extend([b"COUNT".to_vec(), self.one(&[b"1", b"2", b"5", b"100", b"0", b"x"])]);
        }
        if self.chance(20) {
            options.extend([b"TYPE".to_vec(), self.one(&[b"string", b"STRING", b"list", b"nothing"])]);
        }
        options
    }

    fn transaction(&mut self) -> Vec<Command> {
        let mut commands: Vec<Command> = Vec::new();
        if self.chance(40) {
            let mut watch = vec![b"WATCH".to_vec()];
            for _ in 0..1 + self.random.usize(..3) {
                watch.push(self.key(Keyed::OneShard));
            }
            commands.push(watch);
            if self.chance(30) {
                commands.push(self.tagged_command());
            }
            if self.chance(10) {
                commands.push(vec![b"UNWATCH".to_vec()]);
            }
        }
        commands.push(vec![b"MULTI".to_vec()]);
        for _ in 0..self.random.usize(..8) {
            commands.push(self.tagged_command());
        }
        commands.push(match self.random.u32(..10) {
            0 => vec![b"DISCARD".to_vec()],
            1 => vec![b"RESET".to_vec()],
            _ => vec![b"EXEC".to_vec()],
        });
        if self.chance(10) {
            // Outside of a transaction, or one too many.
            let name = self.one(&[b"EXEC", b"DISCARD", b"UNWATCH"]);
            commands.push(vec![name]);
        }
        commands
    }

    /// A command that is allowed in a transaction over keys of one tag.
    fn tagged_command(&mut self) -> Command {
        if self.reach == Reach::Everything {
            return self.command();
        }
        loop {
            let row = self.row();
            let all_shards = ["KEYS", "FLUSHDB", "FLUSHALL", "DBSIZE", "RANDOMKEY", "SCAN"];
            if !all_shards.contains(&row.name) {
                return self.fill(row, Keyed::OneShard);
            }
        }
    }

    fn command(&mut self) -> Command {
        let row = self.row();
        self.fill(row, row.keyed)
    }

    fn row(&mut self) -> &'static Row {
        loop {
            let row = self.any_row();
            // Settings are those of the gateway asked, and there are two.
            if self.reach == Reach::Everything || row.name != "CONFIG" {
                return row;
            }
        }
    }

    fn any_row(&mut self) -> &'static Row {
        let mut left = self.random.u32(..self.weights);
        for row in ROWS {
            if left < row.weight {
                return row;
            }
            left -= row.weight;
        }
        &ROWS[0]
    }

    fn fill(&mut self, row: &Row, keyed: Keyed) -> Command {
        let name = match self.random.u32(..10) {
            0 => row.name.to_ascii_lowercase(),
            1 => row
                .name
                .chars()
                .map(|letter| if self.random.bool() { letter.to_ascii_lowercase() } else { letter })
                .collect(),
            _ => row.name.to_owned(),
        };
        let mut command = vec![name.into_bytes()];
        for slot in row.slots {
            self.fill_slot(*slot, keyed, &mut command);
        }
        if self.chance(10) {
            self.spoil(&mut command, keyed);
        }
        command
    }

    /// Leaves out, adds or replaces an argument. None of this makes a short time to live out of another number.
    fn spoil(&mut self, command: &mut Command, keyed: Keyed) {
        if keyed == Keyed::OneShard && self.reach == Reach::OneTagWhereNeeded {
            // Any other change could make a key of another shard.
            if command.len() > 1 {
                command.pop();
            }
            return;
        }
        let odd = self.one(ODD);
        match self.random.u32(..4) {
            0 if command.len() > 1 => {
                let index = self.random.usize(1..command.len());
                command.remove(index);
            }
            1 => command.push(odd),
            2 => {
                let index = self.random.usize(1..=command.len());
                command.insert(index, odd);
            }
            _ if command.len() > 1 => {
                let index = self.random.usize(1..command.len());
                command[index] = odd;
            }
            _ => {}
        }
    }

    fn key(&mut self, keyed: Keyed) -> Vec<u8> {
        if keyed == Keyed::OneShard && self.reach == Reach::OneTagWhereNeeded || self.chance(30) {
            return self.one(TAGGED_KEYS);
        }
        if self.chance(2) {
            return long_key();
        }
        self.one(PLAIN_KEYS)
    }

    fn value(&mut self) -> Vec<u8> {
        match self.random.u32(..20) {
            0 => {
                let length = self.random.usize(..1500);
                (0..length).map(|_| self.random.u8(..)).collect()
            }
            1 => {
                let length = self.random.usize(..300);
                (0..length).map(|_| self.random.u8(b'a'..=b'd')).collect()
            }
            2 => self.random.i64(..).to_string().into_bytes(),
            3 => self.random.i64(-1000..1000).to_string().into_bytes(),
            _ => self.one(VALUES),
        }
    }

    /// A payload of a string, right or mutilated. Never one of another type, which redis-server keeps.
    fn payload(&mut self) -> Vec<u8> {
        let mut body = vec![0];
        match self.random.u32(..8) {
            kind @ 0..3 => {
                body.push(0xc0 + kind as u8);
                body.extend((0..1 << kind).map(|_| self.random.u8(..)));
            }
            3 => {
                // Compressed: some literals, and then the last of them a few times more.
                let literals = 1 + self.random.u8(..32);
                let more = self.random.u8(..7) + 2;
                body.extend([0xc3, literals + 3, literals + more, literals - 1]);
                body.extend((0..literals).map(|_| self.random.u8(..)));
                body.extend([(more - 2).max(1) << 5, self.random.u8(..4)]);
            }
            _ => {
                let mut value = self.value();
                value.truncate((1 << 14) - 1);
                body.extend([0x40 | (value.len() >> 8) as u8, value.len() as u8]);
                body.extend(value);
            }
        }
        if self.chance(20) {
            let at = self.random.usize(1..body.len());
            body[at] = self.random.u8(..);
        }
        if self.chance(5) {
            body.truncate(self.random.usize(1..=body.len()));
        }
        if self.chance(5) {
            body[0] = [8, 20, 100, 255][self.random.usize(..4)];
        }
        let version = [10, 10, 10, 10, 9, 6, 0, 11, 266][self.random.usize(..9)];
        let mut payload = payload::sealed(&body, version);
        if self.chance(10) {
            let at = self.random.usize(1..payload.len());
            payload[at] ^= 1 << self.random.u32(..8);
        }
        payload
    }

    fn number(&mut self, sensible: i64) -> Vec<u8> {
        if self.chance(80) { sensible.to_string().into_bytes() } else { self.one(ODD) }
    }

    fn fill_slot(&mut self, slot: Slot, keyed: Keyed, command: &mut Command) {
        match slot {
            Slot::Key => {
                let key = self.key(keyed);
                command.push(key);
            }
            Slot::Keys => {
                for _ in 0..1 + self.random.usize(..6) {
                    let key = self.key(keyed);
                    command.push(key);
                }
            }
            Slot::Pairs => {
                for _ in 0..1 + self.random.usize(..5) {
                    let (key, value) = (self.key(keyed), self.value());
                    command.extend([key, value]);
                }
            }
            Slot::Value => {
                let value = self.value();
                command.push(value);
            }
            Slot::Integer => {
                let sensible = match self.random.u32(..4) {
                    0 => self.random.i64(..),
                    1 => i64::MAX - self.random.i64(0..3),
                    _ => self.random.i64(-100..100),
                };
                let number = self.number(sensible);
                command.push(number);
            }
            Slot::Float => {
                let number = match self.random.u32(..5) {
                    0 => {
                        let digits = self.random.i64(-10_000_000..10_000_000);
                        let scale = self.random.u32(..9) as usize;
                        format!("{:.scale$}", digits as f64 / 10f64.powi(scale as i32)).into_bytes()
                    }
                    1 => self.one(ODD),
                    _ => self.one(FLOATS),
                };
                command.push(number);
            }
            Slot::Offset => {
                let sensible = match self.random.u32(..8) {
                    0 => -self.random.i64(0..70),
                    // Beyond the longest value there may be: refused, not filled with zeros.
                    1 => 536_870_912 + self.random.i64(0..10),
                    _ => self.random.i64(0..70),
                };
                let number = self.number(sensible);
                command.push(number);
            }
            Slot::Seconds => {
                let sensible = self.random.i64(1_000..1_000_000);
                let number = self.number(sensible);
                command.push(number);
            }
            Slot::Milliseconds => {
                let sensible = self.random.i64(1_000_000..1_000_000_000);
                let number = self.number(sensible);
                command.push(number);
            }
            Slot::UnixSeconds => {
                let sensible = self.unix_seconds();
                let number = self.number(sensible);
                command.push(number);
            }
            Slot::UnixMilliseconds => {
                let sensible = self.unix_seconds() * 1000 + self.random.i64(0..1000);
                let number = self.number(sensible);
                command.push(number);
            }
            Slot::Pattern => {
                let pattern = self.one(PATTERNS);
                command.push(pattern);
            }
            Slot::Text => {
                let text = if self.chance(50) {
                    self.one(ODD)
                } else {
                    self.one(&[b"hello", b"get", b"SET", b"x y", b"HELP ME", b"\xc3\xa9", b"foo'bar", b"long words"])
                };
                command.push(text);
            }
            Slot::Word(word) => command.push(word.as_bytes().to_vec()),
            Slot::Maybe(words) => {
                if self.random.bool() {
                    command.push(words[self.random.usize(..words.len())].as_bytes().to_vec());
                }
            }
            Slot::SetOptions => {
                for _ in 0..[0, 0, 0, 1, 1, 1, 2, 3][self.random.usize(..8)] {
                    match self.random.u32(..9) {
                        0 | 1 => command.push(b"NX".to_vec()),
                        2 | 3 => command.push(b"XX".to_vec()),
                        4 => command.push(b"GET".to_vec()),
                        5 => command.push(b"KEEPTTL".to_vec()),
                        _ => self.expiry_option(command),
                    }
                }
            }
            Slot::GetExOptions => match self.random.u32(..6) {
                0 => {}
                1 => command.push(b"PERSIST".to_vec()),
                2 => {
                    self.expiry_option(command);
                    self.expiry_option(command);
                }
                _ => self.expiry_option(command),
            },
            Slot::LcsOptions => {
                for _ in 0..self.random.usize(..4) {
                    match self.random.u32(..4) {
                        0 => command.push(b"LEN".to_vec()),
                        1 | 2 => command.push(b"IDX".to_vec()),
                        _ if self.random.bool() => command.push(b"WITHMATCHLEN".to_vec()),
                        _ => {
                            command.push(b"MINMATCHLEN".to_vec());
                            let sensible = self.random.i64(-1..5);
                            let number = self.number(sensible);
                            command.push(number);
                        }
                    }
                }
            }
            Slot::Payload => {
                let payload = self.payload();
                command.push(payload);
            }
            Slot::RestoreTime => match self.random.u32(..4) {
                0 | 1 => command.push(b"0".to_vec()),
                2 => self.fill_slot(Slot::Milliseconds, keyed, command),
                _ => self.fill_slot(Slot::UnixMilliseconds, keyed, command),
            },
            Slot::RestoreOptions => {
                for _ in 0..self.random.usize(..3) {
                    match self.random.u32(..8) {
                        0..4 => command.push(b"REPLACE".to_vec()),
                        4 | 5 => command.push(b"absttl".to_vec()),
                        6 => {
                            let sensible = self.random.i64(-1..1000);
                            let number = self.number(sensible);
                            command.extend([b"IDLETIME".to_vec(), number]);
                        }
                        _ => {
                            let sensible = self.random.i64(-1..258);
                            let number = self.number(sensible);
                            command.extend([b"Freq".to_vec(), number]);
                        }
                    }
                }
            }
            Slot::CopyOptions => {
                if self.random.bool() {
                    command.push(b"REPLACE".to_vec());
                }
                if self.chance(20) {
                    let number = self.one(&[b"0", b"x", b"-1", b"99"]);
                    command.extend([b"DB".to_vec(), number]);
                }
            }
        }
    }

    fn expiry_option(&mut self, command: &mut Command) {
        let (option, slot): (&[u8], Slot) = match self.random.u32(..4) {
            0 => (b"EX", Slot::Seconds),
            1 => (b"PX", Slot::Milliseconds),
            2 => (b"EXAT", Slot::UnixSeconds),
            _ => (b"pxat", Slot::UnixMilliseconds),
        };
        command.push(option.to_vec());
        self.fill_slot(slot, Keyed::NoKey, command);
    }

    /// Long ago or far away; the same in every repetition.
    fn unix_seconds(&mut self) -> i64 {
        match self.random.u32(..4) {
            0 => self.random.i64(1..1_000_000),
            _ => 4_000_000_000 + self.random.i64(0..1_000_000),
        }
    }
}
