//! Runs command lines through the handlers with a session of their own, and shows the replies as text: for tests.

use super::{Ask, Context, Next, Round, ShardRequest, container, handler};
use crate::routing::Routing;
use crate::session::Session;
use crate::settings::{Config, Settings};
use crate::shared::Shared;
use crate::upstream::masters::{Change, Masters};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio_util::sync::CancellationToken;
use vasto_proto::batch::{Arguments, write_bytes};
use vasto_proto::command::table::{Command, find, find_subcommand};
use vasto_proto::command::{Args, Flags, Reply, ReplyWriter};
use vasto_proto::error::{CommandError, wrong_arity};
use vasto_proto::id::{ClusterId, KeyspaceId, StoreId};
use vasto_proto::topology::{Fsync, KeyspaceRecord, Snapshot, StoreInfo};

/// Answers a request with a packed reply.
pub type Shards<'a> = &'a mut dyn FnMut(&ShardRequest) -> Vec<u8>;

pub struct Harness {
    pub shared: Shared,
    pub session: Session,
    pub routing: Routing,
    /// The last command asked for the connection's end.
    pub closes: bool,
    pub delay: Option<Duration>,
    /// What the last command asked of the master, and what the master answers.
    pub asked_master: Option<Change>,
    pub master: Vec<u8>,
}

/// A command line as the dispatcher sees it: row and packed arguments.
pub struct Line {
    pub command: Command,
    pub argument_count: u32,
    pub packed_arguments: Vec<u8>,
}

impl Harness {
    /// Two stores, the keyspaces `0` with three shards and `users` with one; connection 1.
    pub fn new() -> Self {
        let stores = [StoreId(0xa), StoreId(0xb)];
        let record =
            |id, name, primaries: &[StoreId]| KeyspaceRecord::new(KeyspaceId(id), name, primaries).expect("valid");
        let info = |id: StoreId| StoreInfo {
            id,
            address: format!("10.0.0.{}:7201", id.0),
            up: id.0 == 0xa,
            free_disk_bytes: 1 << 30,
            fsync: Some(Fsync::EverySecond),
            zone: if id.0 == 0xb { "cellar".to_owned() } else { String::new() },
            tags: if id.0 == 0xb { vec!["ssd".to_owned(), "old".to_owned()] } else { Vec::new() },
        };
        let snapshot = Snapshot {
            cluster: ClusterId(0xc),
            version: 7,
            stores: stores.iter().copied().map(info).collect(),
            keyspaces: vec![record(0, "0", &[stores[0], stores[1], stores[0]]), record(5, "users", &[stores[1]])],
            ..Snapshot::default()
        };
        let config = Config { data_directory: Some("./data".to_owned()), ..Config::default() };
        let shared = Shared {
            settings: Settings::new(&config),
            clients: crate::clients::Clients::new(),
            slowlog: crate::slowlog::Slowlog::new(),
            statistics: crate::statistics::Statistics::new(),
            masters: Masters::new(Vec::new(), tokio::sync::watch::channel(Arc::default()).1),
            started: Instant::now(),
            started_at: SystemTime::now(),
            started_with: crate::process::Memory::read(),
            run_id: "0123456789abcdef0123456789abcdef01234567".to_owned(),
            shutdown: CancellationToken::new(),
        };
        let master = packed(|reply| reply.ok());
        let client = shared.clients.register("127.0.0.1:5000".into(), "127.0.0.1:6379".into(), false);
        let session = Session::new(client);
        Self {
            shared,
            session,
            routing: Routing::new(Arc::new(snapshot)),
            closes: false,
            delay: None,
            asked_master: None,
            master,
        }
    }

    pub fn context<'a>(&'a mut self, reply: &'a mut Vec<u8>) -> Context<'a> {
        Context { session: &mut self.session, shared: &self.shared, routing: &self.routing, reply }
    }

    /// Runs a command that asks no shard.
    pub fn run(&mut self, line: &str) -> String {
        self.run_with(line, &mut |request| panic!("no shard should be asked: {request:?}"))
    }

    pub fn run_with(&mut self, line: &str, shards: Shards<'_>) -> String {
        let words = words(line);
        let line = match parse(&words) {
            Ok(line) => line,
            Err(error) => return format!("-{}", error.text()),
        };
        let Command::Gateway(command) = line.command else {
            panic!("{words:?} is a store's command");
        };
        let args = Args::new(Arguments::parse(&line.packed_arguments, line.argument_count).expect("packed above"));
        let mut reply = Vec::new();
        (self.closes, self.delay, self.asked_master) = (false, None, None);
        let next = handler(command)(&mut self.context(&mut reply), args);
        match next {
            Ok(Next::Replied) => {}
            Ok(Next::RepliedThenClose) => self.closes = true,
            Ok(Next::RepliedAfter(delay)) => self.delay = Some(delay),
            Ok(Next::Silent) => return "(silent)".to_owned(),
            Ok(Next::Shutdown) => return "(shutdown)".to_owned(),
            Ok(Next::AskMaster(change, ask)) => {
                self.asked_master = Some(change);
                let answers = vec![self.master.clone()];
                if let Err(error) = self.drive_on(ask, answers, &mut reply, shards) {
                    return format!("-{}", error.text());
                }
            }
            Ok(Next::Ask(ask)) => {
                if let Err(error) = self.drive(ask, &mut reply, shards) {
                    return format!("-{}", error.text());
                }
            }
            Err(error) => {
                assert!(reply.is_empty(), "a failed handler has replied");
                return format!("-{}", error.text());
            }
        }
        show(&reply)
    }

    fn drive(&mut self, mut ask: Box<dyn Ask>, reply: &mut Vec<u8>, shards: Shards<'_>) -> Result<(), CommandError> {
        let requests = ask.start(&mut self.context(reply))?;
        let answers = requests.iter().map(&mut *shards).collect();
        self.drive_on(ask, answers, reply, shards)
    }

    /// From the answers of the first round on.
    fn drive_on(
        &mut self,
        mut ask: Box<dyn Ask>,
        mut answers: Vec<Vec<u8>>,
        reply: &mut Vec<u8>,
        shards: Shards<'_>,
    ) -> Result<(), CommandError> {
        loop {
            match ask.next(&mut self.context(reply), answers)? {
                Round::Again(requests) | Round::Later { requests, .. } => {
                    answers = requests.iter().map(&mut *shards).collect();
                }
                Round::Done => return Ok(()),
            }
        }
    }

    /// Runs lines of `> command / < reply`.
    pub fn script(&mut self, script: &str) {
        for step in script.lines().map(str::trim).filter(|step| !step.is_empty()) {
            let (line, expected) =
                step.strip_prefix("> ").and_then(|step| step.split_once(" / < ")).expect("> command / < reply");
            assert_eq!(self.run(line), expected, "{line}");
        }
    }
}

/// Words of a line; quoted ones may be empty or hold blanks, `\n` and `\xNN` are escapes.
pub fn words(line: &str) -> Vec<Vec<u8>> {
    let mut words = Vec::new();
    let mut word: Option<Vec<u8>> = None;
    let mut quoted = false;
    let mut letters = line.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            ' ' if !quoted => words.extend(word.take()),
            '\\' => {
                let byte = match letters.next().expect("something is escaped") {
                    'n' => b'\n',
                    'x' => {
                        let digits: String = letters.by_ref().take(2).collect();
                        u8::from_str_radix(&digits, 16).expect("two hexadecimal digits")
                    }
                    other => u8::try_from(other).expect("ASCII"),
                };
                word.get_or_insert_default().push(byte);
            }
            _ => word.get_or_insert_default().extend(letter.to_string().bytes()),
        }
    }
    words.extend(word);
    words
}

pub fn parse(words: &[Vec<u8>]) -> Result<Line, CommandError> {
    let mut command = find(&words[0]).expect("a command");
    if command.spec().flags.contains(Flags::CONTAINER) && words.len() > 1 {
        command = find_subcommand(command.spec(), &words[1])
            .ok_or_else(|| container::unknown_subcommand(command.spec().name, &words[1]))?;
    }
    let spec = command.spec();
    if !spec.accepts_count(words.len()) {
        return Err(wrong_arity(spec.name));
    }
    let arguments = &words[spec.name_words()..];
    let mut packed_arguments = Vec::new();
    arguments.iter().for_each(|argument| write_bytes(&mut packed_arguments, argument));
    let argument_count = u32::try_from(arguments.len()).expect("a short line");
    Ok(Line { command, argument_count, packed_arguments })
}

/// A packed reply written by `write`.
pub fn packed(write: impl FnOnce(&mut ReplyWriter<'_>)) -> Vec<u8> {
    let mut out = Vec::new();
    write(&mut ReplyWriter::new(&mut out));
    out
}

/// A packed reply as text.
pub fn show(mut reply: &[u8]) -> String {
    let mut text = String::new();
    show_into(&mut text, &mut reply);
    assert!(reply.is_empty(), "more than one reply");
    text
}

fn show_into(text: &mut String, reply: &mut &[u8]) {
    let quoted = |bytes: &[u8]| format!("{:?}", String::from_utf8_lossy(bytes));
    let plain = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let head = Reply::take(reply).expect("a whole reply");
    let aggregate = |text: &mut String, reply: &mut &[u8], open: &str, count: usize, close: &str| {
        text.push_str(open);
        for place in 0..count {
            text.push_str(if place > 0 { ", " } else { "" });
            show_into(text, reply);
        }
        text.push_str(close);
    };
    match head {
        Reply::Ok => text.push_str("OK"),
        Reply::Simple(bytes) => text.push_str(&format!("+{}", plain(bytes))),
        Reply::Error(bytes) => text.push_str(&format!("-{}", plain(bytes))),
        Reply::Integer(number) => text.push_str(&number.to_string()),
        Reply::Double(number) => text.push_str(&format!("{number:?}")),
        Reply::Boolean(value) => text.push_str(&value.to_string()),
        Reply::Bulk(bytes) => text.push_str(&quoted(bytes)),
        Reply::Verbatim(bytes) => text.push_str(&format!("txt:{}", quoted(bytes))),
        Reply::Protocol(version) => {
            text.push_str(&format!("RESP{version} "));
            show_into(text, reply);
        }
        Reply::Null => text.push_str("null"),
        Reply::NullArray => text.push_str("null array"),
        Reply::Array(count) => aggregate(text, reply, "[", count, "]"),
        Reply::Set(count) => aggregate(text, reply, "~[", count, "]"),
        Reply::Map(count) => {
            text.push('{');
            for place in 0..count {
                text.push_str(if place > 0 { ", " } else { "" });
                show_into(text, reply);
                let _ = write!(text, ": ");
                show_into(text, reply);
            }
            text.push('}');
        }
    }
}
