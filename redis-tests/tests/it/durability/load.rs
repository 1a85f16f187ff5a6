//! A mixed load whose writers know what every key must hold, to the byte, and what it may hold after a cut.
//!
//! Each writer has keys of its own and sees its replies in order. So it always knows the one state that its keys are in; after a
//! cut the states are those behind each of the operations that were not answered any more, and nothing in between.

use std::collections::VecDeque;
use std::sync::Arc;

use fastrand::Rng;
use redis_tests::{Address, Connection, Value, resp};

/// Operations that a writer sends in one packet, at most.
const PIPELINE_MAX: usize = 16;
/// A text that has grown longer is written anew.
const TEXT_BYTES_MAX: usize = 2_000;
/// Around 100 KB: over several blocks of the log, and over several writes of the file.
const LARGE_BYTES: std::ops::Range<usize> = 60_000..160_000;
/// Keys that are read back in one packet.
const READ_KEYS: usize = 100;

/// What one key holds.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stored {
    value: Arc<Vec<u8>>,
    expires_at_ms: Option<u64>,
}

/// What the keys of a unit hold, all at one moment.
type State = Vec<Option<Stored>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    Large,
    Counter,
    /// Two texts and a counter in one hash tag: changed together or not at all.
    Group,
}

/// Keys that change together.
struct Unit {
    kind: Kind,
    keys: Vec<String>,
    state: State,
    /// The states behind each operation that was sent and is not answered yet.
    pending: VecDeque<State>,
}

/// What an operation sends, must be answered, and leaves behind.
struct Planned {
    commands: Vec<Vec<Vec<u8>>>,
    replies: Vec<Value>,
    state: State,
}

/// One connection's worth of load.
pub struct Writer {
    units: Vec<Unit>,
    random: Rng,
    /// Makes every value another one.
    version: u64,
    pub acknowledged: u64,
    /// Operations without an answer that were found done, and not done, after a cut.
    pub found_done: u64,
    pub found_undone: u64,
}

impl Writer {
    pub fn new(name: &str, random: Rng) -> Writer {
        let mut units = Vec::new();
        let mut add = |kind, keys: Vec<String>| {
            let state = vec![None; keys.len()];
            units.push(Unit { kind, keys, state, pending: VecDeque::new() });
        };
        for number in 0..40 {
            add(Kind::Text, vec![format!("text:{name}:{number}")]);
        }
        for number in 0..3 {
            add(Kind::Large, vec![format!("large:{name}:{number}")]);
        }
        for number in 0..6 {
            add(Kind::Counter, vec![format!("counter:{name}:{number}")]);
        }
        for number in 0..10 {
            let tag = format!("{{group:{name}:{number}}}");
            add(Kind::Group, vec![format!("{tag}:a"), format!("{tag}:b"), format!("{tag}:n")]);
        }
        Writer { units, random, version: 0, acknowledged: 0, found_done: 0, found_undone: 0 }
    }

    /// Writes until the connection breaks. Every answer must be the one that the model gives.
    pub fn write_until_cut(&mut self, connection: &mut Connection) {
        loop {
            let mut packet = Vec::new();
            let mut sent = Vec::new();
            for _ in 0..self.random.usize(1..=PIPELINE_MAX) {
                let number = self.random.usize(..self.units.len());
                // Large values are a twentieth of the units and most of the bytes: one in four is enough.
                if self.units[number].kind == Kind::Large && self.random.u8(..4) > 0 {
                    continue;
                }
                self.version += 1;
                let unit = &mut self.units[number];
                let planned = unit.plan(&mut self.random, self.version);
                for command in &planned.commands {
                    packet.extend_from_slice(&resp::command(command));
                }
                unit.pending.push_back(planned.state);
                sent.push((number, planned.replies));
            }
            if connection.send(&packet).is_err() {
                return;
            }
            for (number, replies) in sent {
                for expected in replies {
                    match connection.read_value() {
                        Ok(reply) => {
                            assert_eq!(reply, expected, "about {:?}", self.units[number].keys);
                        }
                        Err(_) => return,
                    }
                }
                let unit = &mut self.units[number];
                unit.state = unit.pending.pop_front().expect("a state waits for each operation that was sent");
                self.acknowledged += 1;
            }
        }
    }

    /// Reads everything back after a cut and takes it as the new state; says what is lost, half done, or was never written.
    pub fn check(&mut self, connection: &mut Connection) -> Vec<String> {
        let mut wrong = Vec::new();
        for units in self.units.chunks_mut(READ_KEYS) {
            let commands: Vec<Vec<&[u8]>> = units
                .iter()
                .flat_map(|unit| &unit.keys)
                .flat_map(|key| [vec![&b"GET"[..], key.as_bytes()], vec![&b"PEXPIRETIME"[..], key.as_bytes()]])
                .collect();
            let mut replies = connection.pipeline(&commands).expect("the server answers").into_iter();
            for unit in units {
                let found: State = unit
                    .keys
                    .iter()
                    .map(|key| match (replies.next(), replies.next()) {
                        (Some(Value::Nil), Some(Value::Integer(-2))) => None,
                        (Some(Value::Bulk(value)), Some(Value::Integer(expiry))) => {
                            Some(Stored { value: Arc::new(value), expires_at_ms: u64::try_from(expiry).ok() })
                        }
                        (value, expiry) => panic!("{key}: {value:?}, {expiry:?}"),
                    })
                    .collect();
                let unanswered = unit.pending.len() as u64;
                // The latest that fits: a counter that was deleted and set again may pass through one state twice.
                let states = std::iter::once(&unit.state).chain(&unit.pending).enumerate();
                match states.filter(|(_, state)| **state == found).map(|(position, _)| position).max() {
                    Some(done) => {
                        self.found_done += done as u64;
                        self.found_undone += unanswered - done as u64;
                    }
                    None => wrong.push(format!(
                        "{:?} hold {}; acknowledged was {}, without an answer {:?}",
                        unit.keys,
                        shown(&found),
                        shown(&unit.state),
                        unit.pending.iter().map(shown).collect::<Vec<_>>(),
                    )),
                }
                unit.state = found;
                unit.pending.clear();
            }
        }
        wrong
    }

    /// Someone flushed everything, and was answered.
    pub fn was_flushed(&mut self) {
        for unit in &mut self.units {
            assert!(unit.pending.is_empty(), "nothing is under way");
            unit.state = vec![None; unit.keys.len()];
        }
    }
}

fn shown(state: &State) -> String {
    let keys: Vec<String> = state
        .iter()
        .map(|stored| match stored {
            None => "nothing".to_owned(),
            Some(Stored { value, expires_at_ms }) => {
                let beginning = value[..value.len().min(60)].escape_ascii();
                format!("'{beginning}' ({} bytes, expires at {expires_at_ms:?})", value.len())
            }
        })
        .collect();
    format!("[{}]", keys.join(", "))
}

/// A value that says what it is, and whose every byte depends on it: no part of it passes for another's.
fn pattern(key: &str, version: u64, length: usize) -> Vec<u8> {
    let mut value = format!("{key}#{version}#{length}#").into_bytes();
    let mut random = Rng::with_seed(version ^ length as u64);
    while value.len() < length {
        value.extend_from_slice(&random.u64(..).to_le_bytes());
    }
    value
}

fn command(words: &[&[u8]]) -> Vec<Vec<u8>> {
    words.iter().map(|word| word.to_vec()).collect()
}

fn plain(value: Vec<u8>) -> Option<Stored> {
    Some(Stored { value: Arc::new(value), expires_at_ms: None })
}

impl Unit {
    /// The state that the next operation will find.
    fn latest(&self) -> &State {
        self.pending.back().unwrap_or(&self.state)
    }

    fn plan(&self, random: &mut Rng, version: u64) -> Planned {
        match self.kind {
            Kind::Text => self.plan_text(random, version),
            Kind::Large => self.plan_large(random, version),
            Kind::Counter => self.plan_counter(random),
            Kind::Group => self.plan_group(random, version),
        }
    }

    fn plan_text(&self, random: &mut Rng, version: u64) -> Planned {
        let key = self.keys[0].as_str();
        let name = key.as_bytes();
        let before = self.latest()[0].clone();
        let value = pattern(key, version, random.usize(30..250));
        // In 2033 to 2065: far enough for any clock of a test.
        let expiry_ms = random.u64(2_000_000_000_000..3_000_000_000_000);
        let expiry = expiry_ms.to_string();
        let (words, reply, after): (Vec<&[u8]>, Value, Option<Stored>) = match random.u8(..10) {
            0..=2 => (vec![b"SET", name, &value], Value::ok(), plain(value.clone())),
            3 => {
                let stored = Stored { value: Arc::new(value.clone()), expires_at_ms: Some(expiry_ms) };
                (vec![b"SET", name, &value, b"PXAT", expiry.as_bytes()], Value::ok(), Some(stored))
            }
            4..=5 if before.as_ref().is_none_or(|stored| stored.value.len() < TEXT_BYTES_MAX) => {
                let mut stored = before.unwrap_or_else(|| Stored { value: Arc::default(), expires_at_ms: None });
                Arc::make_mut(&mut stored.value).extend_from_slice(&value);
                (vec![b"APPEND", name, &value], Value::Integer(stored.value.len() as i64), Some(stored))
            }
            4..=6 => (vec![b"DEL", name], Value::Integer(before.is_some().into()), None),
            7 => {
                let reply = Value::Integer(before.is_some().into());
                let after = before.map(|stored| Stored { expires_at_ms: Some(expiry_ms), ..stored });
                (vec![b"PEXPIREAT", name, expiry.as_bytes()], reply, after)
            }
            8 => {
                let had_expiry = before.as_ref().is_some_and(|stored| stored.expires_at_ms.is_some());
                let after = before.map(|stored| Stored { expires_at_ms: None, ..stored });
                (vec![b"PERSIST", name], Value::Integer(had_expiry.into()), after)
            }
            _ => {
                let reply = before.as_ref().map_or(Value::Nil, |stored| Value::bulk(stored.value.as_slice()));
                (vec![b"GET", name], reply, before)
            }
        };
        Planned { commands: vec![command(&words)], replies: vec![reply], state: vec![after] }
    }

    fn plan_large(&self, random: &mut Rng, version: u64) -> Planned {
        let key = self.keys[0].as_str();
        if random.u8(..8) == 0 {
            let reply = Value::Integer(self.latest()[0].is_some().into());
            return Planned {
                commands: vec![command(&[b"DEL", key.as_bytes()])],
                replies: vec![reply],
                state: vec![None],
            };
        }
        let value = pattern(key, version, random.usize(LARGE_BYTES));
        Planned {
            commands: vec![command(&[b"SET", key.as_bytes(), &value])],
            replies: vec![Value::ok()],
            state: vec![plain(value)],
        }
    }

    fn plan_counter(&self, random: &mut Rng) -> Planned {
        let name = self.keys[0].as_bytes();
        let before = number(&self.latest()[0]);
        let (words, after) = if random.bool() {
            (command(&[b"INCR", name]), before + 1)
        } else {
            let step = random.i64(1..1_000);
            (command(&[b"DECRBY", name, step.to_string().as_bytes()]), before - step)
        };
        Planned {
            commands: vec![words],
            replies: vec![Value::Integer(after)],
            state: vec![plain(after.to_string().into_bytes())],
        }
    }

    fn plan_group(&self, random: &mut Rng, version: u64) -> Planned {
        let [a, b, n] = &self.keys[..] else { panic!("a group has three keys") };
        let [name_a, name_b, name_n] = [a, b, n].map(|key| key.as_bytes());
        let before = self.latest().clone();
        let [value_a, value_b] = [a, b].map(|key| pattern(key, version, random.usize(60..2_000)));
        match random.u8(..5) {
            0..=1 => Planned {
                commands: vec![command(&[b"MSET", name_a, &value_a, name_b, &value_b])],
                replies: vec![Value::ok()],
                state: vec![plain(value_a), plain(value_b), before[2].clone()],
            },
            2..=3 => {
                let count = number(&before[2]) + 1;
                let queued = Value::Simple(b"QUEUED".to_vec());
                let done = Value::Array(vec![Value::ok(), Value::ok(), Value::Integer(count)]);
                Planned {
                    commands: vec![
                        command(&[b"MULTI"]),
                        command(&[b"SET", name_a, &value_a]),
                        command(&[b"SET", name_b, &value_b]),
                        command(&[b"INCR", name_n]),
                        command(&[b"EXEC"]),
                    ],
                    replies: vec![Value::ok(), queued.clone(), queued.clone(), queued, done],
                    state: vec![plain(value_a), plain(value_b), plain(count.to_string().into_bytes())],
                }
            }
            _ => Planned {
                commands: vec![command(&[b"DEL", name_a, name_b, name_n])],
                replies: vec![Value::Integer(before.iter().flatten().count() as i64)],
                state: vec![None, None, None],
            },
        }
    }
}

fn number(stored: &Option<Stored>) -> i64 {
    let Some(stored) = stored else { return 0 };
    std::str::from_utf8(&stored.value).ok().and_then(|digits| digits.parse().ok()).expect("a counter holds a number")
}

/// Connections for all writers, open before the load begins.
pub fn connect(address: &Address, count: usize) -> Vec<Connection> {
    (0..count).map(|_| Connection::open(address)).collect()
}
