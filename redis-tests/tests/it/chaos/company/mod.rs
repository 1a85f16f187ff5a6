//! Other clients beside the load, each of a kind that the load has not: walks by SCAN, commands over all shards, keys that expire, transactions.
//!
//! Each checks by itself what it is answered, and goes from one gateway to the other. What they must find is written before they begin.

mod batches;
mod expiries;
mod transactions;
mod walks;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use redis_tests::eventually::{eventually_within, pause};
use redis_tests::history::{Outcome, open_in, outcome_of_error};
use redis_tests::{Address, Cluster, Connection, Value};

use super::{KEYSPACE, RECOVERY_PATIENCE};

/// Keys that are there throughout.
const STAYING: usize = 1_500;

/// Keys that are deleted before anything happens.
const GONE: usize = 300;

/// Bytes of a value that stays.
const VALUE_BYTES: usize = 200;

/// Keys whose rows travel in several messages.
const LARGE: usize = 6;
const LARGE_BYTES: usize = 1 << 20;

/// Between two commands of a client: the servers shall have most of the two cores.
const PAUSE_MICROSECONDS_MAX: u64 = 6_000;

/// After an answer that says to come again.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// As for the load.
const REPLY_TIMEOUT: Duration = Duration::from_secs(20);

/// Commands of one packet.
const PIPELINE: usize = 100;

/// Answers that are shown when they should not have come.
const SHOWN: usize = 10;

/// Whether an operation may be refused, or end with an unknown outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failures {
    /// Nothing dies: every command is answered.
    AreWrong,
    /// Some of what was on its way to a process that died.
    AreCounted,
}

/// What a client has come to.
#[derive(Debug, Default)]
struct Findings {
    commands: u64,
    /// Walks of SCAN from their beginning to their end.
    walks: u64,
    failures: Vec<String>,
    wrong: Vec<String>,
}

impl Findings {
    fn absorb(&mut self, other: Findings) {
        self.commands += other.commands;
        self.walks += other.walks;
        self.failures.extend(other.failures);
        self.wrong.extend(other.wrong);
    }
}

/// How a command ended.
enum Reply {
    Value(Value),
    NotExecuted,
    Unknown,
}

/// One client: it is now at one gateway, now at another.
struct Caller {
    name: String,
    addresses: Vec<Address>,
    gateway: usize,
    connection: Option<Connection>,
    random: fastrand::Rng,
    stop: Arc<AtomicBool>,
    findings: Findings,
}

impl Caller {
    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn pause(&mut self) {
        pause(Duration::from_micros(self.random.u64(..PAUSE_MICROSECONDS_MAX)));
    }

    /// The next command goes to another gateway.
    fn go_to_another_gateway(&mut self) {
        self.gateway = (self.gateway + 1) % self.addresses.len();
        self.connection = None;
    }

    fn wrong(&mut self, what: impl Into<String>) {
        self.findings.wrong.push(format!("{}: {}", self.name, what.into()));
    }

    fn failed(&mut self, what: String) {
        self.findings.failures.push(format!("{}: {what}", self.name));
    }

    /// An open connection, waited for.
    fn connection(&mut self) -> &mut Connection {
        let address = self.addresses[self.gateway].clone();
        let open = self.connection.take().unwrap_or_else(|| {
            eventually_within(RECOVERY_PATIENCE, &format!("{address} serves {KEYSPACE}"), || {
                let mut connection = open_in(&address, KEYSPACE)?;
                connection.set_reply_timeout(REPLY_TIMEOUT).map_err(|error| error.to_string())?;
                Ok::<_, String>(connection)
            })
        });
        self.connection.insert(open)
    }

    fn ask<A: AsRef<[u8]>>(&mut self, words: &[A]) -> Reply {
        let reply = self.connection().try_call(words);
        self.sort_out(words[0].as_ref(), reply)
    }

    fn sort_out(&mut self, command: &[u8], reply: std::io::Result<Value>) -> Reply {
        let command = String::from_utf8_lossy(command).into_owned();
        self.findings.commands += 1;
        let text = match reply {
            Ok(value) if !value.is_error() => return Reply::Value(value),
            Ok(error) => error.text(),
            Err(error) => {
                self.connection = None;
                self.failed(format!("{command}: {error}"));
                return Reply::Unknown;
            }
        };
        match outcome_of_error(&text) {
            Ok(outcome) => {
                self.failed(format!("{command}: {text}"));
                if outcome == Outcome::NotExecuted { Reply::NotExecuted } else { Reply::Unknown }
            }
            Err(text) => {
                self.wrong(format!("{command} was answered {text}"));
                Reply::Unknown
            }
        }
    }

    /// A read is asked again until it is answered; `None` when the client is to stop.
    fn read<A: AsRef<[u8]>>(&mut self, words: &[A]) -> Option<Value> {
        while !self.is_stopped() {
            match self.ask(words) {
                Reply::Value(value) => return Some(value),
                Reply::NotExecuted | Reply::Unknown => pause(RETRY_PAUSE),
            }
        }
        None
    }
}

/// What a kind of client does until it is stopped.
type Run = fn(Caller) -> Findings;

const KINDS: [(&str, Run); 5] = [
    ("a walk", walks::walk),
    ("another walk", walks::walk),
    ("a batch", batches::write_and_read),
    ("an expiry", expiries::set_and_wait),
    ("a transaction", transactions::transact),
];

/// All of them.
pub struct Company {
    addresses: Vec<Address>,
    failures: Failures,
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Findings>>,
}

pub fn staying(number: usize) -> String {
    format!("staying:{number}")
}

pub fn gone(number: usize) -> String {
    format!("gone:{number}")
}

fn large(number: usize) -> String {
    format!("large:{number}")
}

/// What a key holds from the beginning to the end: nothing that could be compressed.
fn value_of(key: &str, bytes: usize) -> Vec<u8> {
    let seed = key.bytes().fold(0, |seed: u64, byte| seed.wrapping_mul(131).wrapping_add(u64::from(byte)));
    let mut random = fastrand::Rng::with_seed(seed);
    std::iter::repeat_with(|| random.u8(..)).take(bytes).collect()
}

/// All keys that stay, with the bytes of their values.
pub fn bytes_that_stay() -> impl Iterator<Item = (String, usize)> {
    let small = (0..STAYING).map(|number| (staying(number), VALUE_BYTES));
    small.chain((0..LARGE).map(|number| (large(number), LARGE_BYTES)))
}

fn in_packets<W: AsRef<[u8]>>(connection: &mut Connection, commands: &[Vec<W>]) -> Vec<Value> {
    commands.chunks(PIPELINE).flat_map(|packet| connection.pipeline(packet).unwrap()).collect()
}

impl Company {
    /// Writes what stays, and starts the clients.
    pub fn start(cluster: &Cluster, seed: u64, failures: Failures) -> Company {
        let addresses: Vec<Address> = (0..cluster.gateways.len()).map(|gateway| cluster.address(gateway)).collect();
        seed_keyspace(&mut open_in(&addresses[0], KEYSPACE).unwrap());
        let stop = Arc::new(AtomicBool::new(false));
        let clients = KINDS.iter().enumerate().map(|(number, (name, run))| {
            let caller = Caller {
                name: (*name).to_owned(),
                gateway: number % addresses.len(),
                addresses: addresses.clone(),
                connection: None,
                random: fastrand::Rng::with_seed(seed.wrapping_add(number as u64)),
                stop: stop.clone(),
                findings: Findings::default(),
            };
            let run = *run;
            std::thread::spawn(move || run(caller))
        });
        Company { clients: clients.collect(), addresses, failures, stop }
    }

    /// Stops them and reads everything that stays; what was wrong, and what failed.
    pub fn stop(self) -> (Vec<String>, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        let mut findings = Findings::default();
        for client in self.clients {
            findings.absorb(client.join().expect("clients do not panic"));
        }
        for address in &self.addresses {
            findings.wrong.extend(changed(&mut open_in(address, KEYSPACE).unwrap()));
        }
        let Findings { commands, walks, failures, wrong } = findings;
        eprintln!(
            "  company: {commands} commands, {walks} whole walks, {} failed: {:?}",
            failures.len(),
            failures.first()
        );
        assert!(walks > 0, "no walk came to its end");
        (wrong, failures)
    }

    /// Stops them; nothing may be wrong.
    pub fn end(self) {
        let is_patient = self.failures == Failures::AreCounted;
        let (wrong, failures) = self.stop();
        assert!(wrong.is_empty(), "{} answers are wrong: {:#?}", wrong.len(), &wrong[..wrong.len().min(SHOWN)]);
        let shown = &failures[..failures.len().min(SHOWN)];
        assert!(is_patient || failures.is_empty(), "{} commands failed: {shown:#?}", failures.len());
    }
}

fn seed_keyspace(connection: &mut Connection) {
    let words = |words: &[&str]| words.iter().map(|word| word.as_bytes().to_vec()).collect::<Vec<_>>();
    let mut commands: Vec<Vec<Vec<u8>>> = (0..STAYING)
        .map(|number| vec![b"SET".to_vec(), staying(number).into(), value_of(&staying(number), VALUE_BYTES)])
        .collect();
    commands.extend((0..GONE).map(|number| words(&["SET", &gone(number), "gone"])));
    commands.extend((0..GONE).map(|number| words(&["DEL", &gone(number)])));
    commands.extend((0..expiries::LASTING).map(|number| {
        let (key, at) = (expiries::lasting(number), expiries::lasts_until(number).to_string());
        words(&["SET", &key, "lasting", "PXAT", &at])
    }));
    for reply in in_packets(connection, &commands) {
        assert!(!reply.is_error(), "{}", reply.text());
    }
    // One at a time: a packet of them would not fit into the sockets.
    for key in (0..LARGE).map(large) {
        connection.done(&[b"SET".to_vec(), key.clone().into(), value_of(&key, LARGE_BYTES)]);
    }
}

/// What is not as it was written at first.
fn changed(connection: &mut Connection) -> Vec<String> {
    let get = |key: &str| vec!["GET".to_owned(), key.to_owned()];
    let mut changed = Vec::new();
    for (key, bytes) in bytes_that_stay() {
        let reply = eventually_within(RECOVERY_PATIENCE, &format!("{key} is read"), || {
            let reply = connection.call(&get(&key));
            if reply.is_error() { Err(reply.text()) } else { Ok(reply) }
        });
        if reply != Value::bulk(value_of(&key, bytes)) {
            changed.push(format!("{key} holds {} bytes that are not its own", reply.bytes().map_or(0, <[u8]>::len)));
        }
    }
    let deleted: Vec<Vec<String>> = (0..GONE).map(|number| get(&gone(number))).collect();
    for (number, reply) in in_packets(connection, &deleted).into_iter().enumerate() {
        if reply != Value::Nil {
            changed.push(format!("{} is back: {}", gone(number), reply.text()));
        }
    }
    let lasting: Vec<Vec<String>> =
        (0..expiries::LASTING).map(|number| vec!["PEXPIRETIME".to_owned(), expiries::lasting(number)]).collect();
    for (number, reply) in in_packets(connection, &lasting).into_iter().enumerate() {
        if reply != Value::Integer(expiries::lasts_until(number)) {
            changed.push(format!("{} expires at {}", expiries::lasting(number), reply.text()));
        }
    }
    changed
}
