//! Runs command lines against a store in a temporary folder, for tests.
//!
//! A line reads `SET k v => OK`. Replies are written as redis-cli writes them, on one line: `OK`, `"text"`, `(nil)`, `(integer) 1`,
//! `(error) ERR text`, `[a, b]`, `{key: value}`.

#![allow(clippy::unwrap_used)]

use crate::config::Config;
use crate::{LateAnswers, Session, Store};
use bytes::Bytes;
use std::fmt::Write;
use tempfile::TempDir;
use vasto_proto::batch::{Answers, OperationHead, Outcome, write_operation};
use vasto_proto::command::Reply;
use vasto_proto::command::table::{Command, StoreCommand, find, find_subcommand};
use vasto_proto::id::{Epoch, KeyspaceId, ShardId, ShardKey};
use vasto_proto::topology::record::KeyspaceRecord;

/// One store with one shard, and one connection to it.
pub struct Script {
    session: Session,
    late: LateAnswers,
    runtime: tokio::runtime::Runtime,
    next_id: u32,
    _store: Store,
    _folder: TempDir,
}

impl Script {
    pub fn new() -> Self {
        Self::with_config(Config::default())
    }

    /// `config` with a data folder of its own.
    pub fn with_config(config: Config) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(Config { data: folder.path().join("data"), ..config }).unwrap();
        let handle = store.handle();
        handle.put_record(KeyspaceRecord::new(KeyspaceId(0), "0", &[handle.id()]).unwrap()).unwrap();
        let (session, late) = handle.open_session();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { session, late, runtime, next_id: 0, _store: store, _folder: folder }
    }

    /// The packed reply of one command.
    pub fn ask(&mut self, command: StoreCommand, arguments: &[&[u8]]) -> Vec<u8> {
        let (outcome, body) = self.operate(command, arguments);
        assert_eq!(outcome, Outcome::Reply, "{}: {}", command.spec().name, String::from_utf8_lossy(&body));
        body
    }

    /// What the commands of one batch answer, as text.
    pub fn batch(&mut self, lines: &[&[&str]]) -> Vec<String> {
        let mut batch = Vec::new();
        for words in lines {
            let Some(Command::Store(command)) = find(words[0].as_bytes()) else { panic!("{words:?}") };
            self.next_id += 1;
            let head = self.head(command);
            write_operation(&mut batch, &head, words[1..].iter().map(|word| word.as_bytes()));
        }
        let mut answers = Vec::new();
        self.session.execute(Bytes::from(batch), &mut answers);
        Answers::new(&answers).map(|answer| text(answer.unwrap().body)).collect()
    }

    fn head(&self, command: StoreCommand) -> OperationHead {
        OperationHead {
            id: self.next_id,
            connection: 1,
            target: ShardKey { keyspace: KeyspaceId(0), shard: ShardId(0) },
            epoch: Epoch(1),
            command: command.code(),
            flags: 0,
        }
    }

    pub fn operate(&mut self, command: StoreCommand, arguments: &[&[u8]]) -> (Outcome, Vec<u8>) {
        self.next_id += 1;
        let head = self.head(command);
        let mut batch = Vec::new();
        write_operation(&mut batch, &head, arguments.iter().copied());
        let mut answers = Vec::new();
        self.session.execute(Bytes::from(batch), &mut answers);
        if answers.is_empty() {
            answers = self.runtime.block_on(self.late.next()).unwrap();
        }
        let mut answers = Answers::new(&answers);
        let answer = answers.next().unwrap().unwrap();
        assert_eq!(answer.id, head.id);
        assert!(answers.next().is_none());
        (answer.outcome, answer.body.to_vec())
    }

    /// What a command line answers, as text.
    pub fn line(&mut self, line: &str) -> String {
        let words = words(line);
        let Some(Command::Store(command)) = find(&words[0]).and_then(|command| match words.get(1) {
            Some(sub) if matches!(command, Command::Gateway(_)) => find_subcommand(command.spec(), sub),
            Some(_) | None => Some(command),
        }) else {
            panic!("no command of the store: {line}");
        };
        let arguments: Vec<&[u8]> = words[command.spec().name_words()..].iter().map(Vec::as_slice).collect();
        let reply = self.ask(command, &arguments);
        text(&reply)
    }

    /// Runs a script and compares every reply.
    pub fn run(&mut self, script: &str) {
        for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let (line, expected) = line.split_once(" => ").unwrap_or_else(|| panic!("no => in {line}"));
            assert_eq!(self.line(line), expected, "{line}");
        }
    }
}

/// Splits at blanks; `""` is the empty word.
pub fn words(line: &str) -> Vec<Vec<u8>> {
    line.split_whitespace().map(|word| if word == "\"\"" { Vec::new() } else { word.as_bytes().to_vec() }).collect()
}

/// A packed reply on one line.
pub fn text(mut reply: &[u8]) -> String {
    let mut out = String::new();
    write_text(&mut out, &mut reply);
    assert!(reply.is_empty(), "something follows {out}");
    out
}

fn write_text(out: &mut String, reply: &mut &[u8]) {
    match Reply::take(reply).unwrap() {
        Reply::Ok => out.push_str("OK"),
        Reply::Simple(text) => out.push_str(std::str::from_utf8(text).unwrap()),
        Reply::Error(text) => write!(out, "(error) {}", String::from_utf8_lossy(text)).unwrap(),
        Reply::Integer(value) => write!(out, "(integer) {value}").unwrap(),
        Reply::Double(value) => write!(out, "(double) {value}").unwrap(),
        Reply::Boolean(value) => write!(out, "({value})").unwrap(),
        Reply::Bulk(text) | Reply::Verbatim(text) => write!(out, "\"{}\"", text.escape_ascii()).unwrap(),
        Reply::Protocol(_) => write_text(out, reply),
        Reply::Null => out.push_str("(nil)"),
        Reply::NullArray => out.push_str("(nil array)"),
        Reply::Array(count) | Reply::Set(count) => {
            out.push('[');
            for index in 0..count {
                out.push_str(if index == 0 { "" } else { ", " });
                write_text(out, reply);
            }
            out.push(']');
        }
        Reply::Map(count) => {
            out.push('{');
            for index in 0..count {
                out.push_str(if index == 0 { "" } else { ", " });
                write_text(out, reply);
                out.push_str(": ");
                write_text(out, reply);
            }
            out.push('}');
        }
    }
}

/// The elements of a packed array of bulk strings.
pub fn bulks<'a>(reply: &mut &'a [u8]) -> Vec<&'a [u8]> {
    let Some(Reply::Array(count)) = Reply::take(reply) else { panic!("no array") };
    let bulk = |_| match Reply::take(reply) {
        Some(Reply::Bulk(text)) => text,
        other => panic!("no bulk string: {other:?}"),
    };
    (0..count).map(bulk).collect()
}

#[test]
fn commands_answer_as_redis_does() {
    let mut script = Script::new();
    script.run(STRINGS);
    script.run(KEYS);
}

/// Recorded from redis-server 7.0.15.
const STRINGS: &str = r#"
    GET s => (nil)
    SET s 1 => OK
    SET s 2 NX => (nil)
    SET s 2 XX GET => "1"
    SET s 3 NX GET => "2"
    SET new 1 NX GET => (nil)
    GET new => "1"
    SET s 1 NX XX => (error) ERR syntax error
    SET s 1 EX 10 PX 10 => (error) ERR syntax error
    SET s 1 EX 10 KEEPTTL => (error) ERR syntax error
    SET s 1 EX => (error) ERR syntax error
    SET s 1 EX 0 => (error) ERR invalid expire time in 'set' command
    SET s 1 PX x => (error) ERR value is not an integer or out of range
    SETEX s 0 v => (error) ERR invalid expire time in 'setex' command
    PSETEX s 9223372036854775807 v => (error) ERR invalid expire time in 'psetex' command
    SET s v EX 100 => OK
    TTL s => (integer) 100
    SET s w KEEPTTL => OK
    TTL s => (integer) 100
    SET s w => OK
    TTL s => (integer) -1
    SET gone v PXAT 1 => OK
    GET gone => (nil)
    SETNX s v => (integer) 0
    GETSET s x => "w"
    GETEX s EX 0 => (error) ERR invalid expire time in 'getex' command
    GETEX missing EX 0 => (nil)
    GETEX s EX 50 => "x"
    TTL s => (integer) 50
    GETEX s PERSIST => "x"
    TTL s => (integer) -1
    GETEX s PERSIST EX 1 => (error) ERR syntax error
    GETEX s PXAT 1 => "x"
    EXISTS s => (integer) 0
    GETDEL new => "1"
    GETDEL new => (nil)
    MSET a 1 b 2 => OK
    MSET a 1 b => (error) ERR wrong number of arguments for 'mset' command
    MGET a x b a => ["1", (nil), "2", "1"]
    MSETNX c 1 a 2 => (integer) 0
    EXISTS c => (integer) 0
    MSETNX c 1 c 2 => (integer) 1
    GET c => "2"
    APPEND a 23 => (integer) 3
    OBJECT ENCODING a => "raw"
    INCR a => (integer) 124
    OBJECT ENCODING a => "int"
    DECRBY a -9223372036854775808 => (error) ERR decrement would overflow
    INCRBY a 9223372036854775807 => (error) ERR increment or decrement would overflow
    INCRBYFLOAT a 0.1 => "124.1"
    INCR a => (error) ERR value is not an integer or out of range
    INCRBYFLOAT a x => (error) ERR value is not a valid float
    INCRBYFLOAT a inf => (error) ERR increment would produce NaN or Infinity
    SETRANGE r 3 ab => (integer) 5
    GET r => "\x00\x00\x00ab"
    SETRANGE r -1 x => (error) ERR offset is out of range
    SETRANGE r 536870912 x => (error) ERR string exceeds maximum allowed size (proto-max-bulk-len)
    SETRANGE r 536870912 "" => (integer) 5
    SETRANGE missing 5 "" => (integer) 0
    GETRANGE r -2 -1 => "ab"
    SUBSTR r 0 0 => "\x00"
    STRLEN r => (integer) 5
    MSET x ohmytext y mynewtext => OK
    LCS x y => "mytext"
    LCS x y LEN => (integer) 6
    LCS x y IDX MINMATCHLEN 4 WITHMATCHLEN => {"matches": [[[(integer) 4, (integer) 7], [(integer) 5, (integer) 8], (integer) 4]], "len": (integer) 6}
    LCS x y IDX LEN => (error) ERR If you want both the length and indexes, please just use IDX.
"#;

/// Recorded from redis-server 7.0.15, but for what MEMORY USAGE counts.
const KEYS: &str = r#"
    FLUSHALL => OK
    DBSIZE => (integer) 0
    RANDOMKEY => (nil)
    KEYS * => []
    MSET a 1 b 2 c 3 => OK
    DBSIZE => (integer) 3
    KEYS [b-z] => ["b", "c"]
    DEL a a x => (integer) 1
    UNLINK a => (integer) 0
    RANDOMKEY x => (error) ERR syntax error
    EXISTS b b x => (integer) 2
    TOUCH b c => (integer) 2
    TYPE b => string
    TYPE x => none
    EXPIRE b 100 => (integer) 1
    EXPIRE b 100 NX => (integer) 0
    EXPIRE b 200 GT => (integer) 1
    EXPIRE b 300 LT => (integer) 0
    EXPIRE c 100 XX => (integer) 0
    EXPIRE c 100 GT => (integer) 0
    EXPIRE c 100 NX GT => (error) ERR NX and XX, GT or LT options at the same time are not compatible
    EXPIRE c 100 GT LT => (error) ERR GT and LT options at the same time are not compatible
    EXPIRE c 100 foo => (error) ERR Unsupported option foo
    EXPIRE c x foo => (error) ERR Unsupported option foo
    EXPIRE c x => (error) ERR value is not an integer or out of range
    EXPIRE c 9223372036854775807 => (error) ERR invalid expire time in 'expire' command
    PEXPIRE c 9223372036854775807 => (error) ERR invalid expire time in 'pexpire' command
    TTL b => (integer) 200
    PEXPIREAT b 4102444800123 => (integer) 1
    PEXPIRETIME b => (integer) 4102444800123
    EXPIRETIME b => (integer) 4102444800
    RENAME b d => OK
    PEXPIRETIME d => (integer) 4102444800123
    RENAME b d => (error) ERR no such key
    RENAME d d => OK
    RENAMENX d c => (integer) 0
    RENAMENX d d => (integer) 0
    RENAMENX d e => (integer) 1
    COPY e c => (integer) 0
    COPY e c REPLACE => (integer) 1
    COPY x y => (integer) 0
    COPY e e => (error) ERR source and destination objects are the same
    COPY e c DB 16 => (error) ERR DB index is out of range
    COPY e c DB 1 => (error) ERR databases have shards of their own and nothing moves between them at once; use DUMP and RESTORE; nothing was executed
    COPY e c DB 3000000000 => (error) ERR value is out of range, value must between -2147483648 and 2147483647
    PERSIST c => (integer) 1
    PERSIST c => (integer) 0
    PTTL c => (integer) -1
    PTTL x => (integer) -2
    EXPIRE c -1 => (integer) 1
    EXISTS c => (integer) 0
    OBJECT ENCODING e => "int"
    OBJECT REFCOUNT e => (integer) 2147483647
    OBJECT IDLETIME e => (integer) 0
    OBJECT IDLETIME x => (nil)
    OBJECT FREQ x => (nil)
    MEMORY USAGE e SAMPLES 0 => (integer) 34
    MEMORY USAGE e SAMPLES -1 => (error) ERR syntax error
    MEMORY USAGE x => (nil)
    FLUSHDB x => (error) ERR syntax error
    FLUSHDB SYNC => OK
    GET e => (nil)
    DBSIZE => (integer) 0
    SET e 1 => OK
    KEYS * => ["e"]
    RANDOMKEY => "e"
"#;
