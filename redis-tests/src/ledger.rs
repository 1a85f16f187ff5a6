//! Writers that keep a ledger of what was acknowledged, and the check that none of it is lost.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::connection::{Address, Connection};
use crate::resp::Value;

/// Each writer writes its own keys, so that it alone knows what each must hold.
const KEYS_PER_WRITER: u64 = 400;

/// Commands that a writer sends in one packet.
const PIPELINE: usize = 8;

/// What one key may hold.
#[derive(Clone, Debug, Default)]
struct Entry {
    acknowledged: Option<u64>,
    /// Written since then without an answer, or with an error: each may or may not be there.
    unknown: Vec<u64>,
}

/// How far one counter may have come.
#[derive(Clone, Copy, Debug, Default)]
struct Counter {
    acknowledged: u64,
    unknown: u64,
}

/// What was acknowledged.
#[derive(Debug, Default)]
pub struct Ledger {
    values: BTreeMap<String, Entry>,
    counters: BTreeMap<String, Counter>,
    /// Answers that were errors, with the text of the last one.
    pub errors: u64,
    pub last_error: Option<String>,
    /// Connections that broke.
    pub breaks: u64,
}

/// Threads that write until they are stopped.
pub struct Writers {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Ledger>>,
}

impl Writers {
    /// So many writers, which take the addresses in turn; each name makes keys of its own.
    pub fn start(name: &str, addresses: &[Address], count: usize) -> Writers {
        let stop = Arc::new(AtomicBool::new(false));
        let acknowledged = Arc::new(AtomicU64::new(0));
        let threads = (0..count)
            .map(|number| {
                let (stop, acknowledged) = (stop.clone(), acknowledged.clone());
                let address = addresses[number % addresses.len()].clone();
                let name = format!("{name}:{number}");
                std::thread::spawn(move || write(&name, &address, &stop, &acknowledged))
            })
            .collect();
        Writers { stop, acknowledged, threads }
    }

    /// Writes that were acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// Waits until so many more writes were acknowledged.
    pub fn wait_for(&self, more: u64) {
        let goal = self.acknowledged() + more;
        crate::eventually!(
            60 s,
            format!("{more} more writes are acknowledged"),
            self.acknowledged() >= goal
        );
    }

    pub fn stop(self) -> Ledger {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Ledger::default();
        for thread in self.threads {
            let ledger = thread.join().expect("writers do not panic");
            all.values.extend(ledger.values);
            all.counters.extend(ledger.counters);
            all.errors += ledger.errors;
            all.breaks += ledger.breaks;
            all.last_error = ledger.last_error.or(all.last_error);
        }
        all
    }
}

enum Write {
    Value(String, u64),
    Count(String),
}

fn write(name: &str, address: &Address, stop: &AtomicBool, acknowledged: &AtomicU64) -> Ledger {
    let mut ledger = Ledger::default();
    let mut connection: Option<Connection> = None;
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        let Some(open) = connection.as_mut() else {
            connection = Connection::try_open(address).ok();
            if connection.is_none() {
                // The server is being restarted.
                crate::eventually::pause(Duration::from_millis(20));
            }
            continue;
        };
        let writes: Vec<Write> = (0..PIPELINE)
            .map(|_| {
                number += 1;
                if number % 5 == 0 {
                    Write::Count(format!("counter:{name}:{}", number % 7))
                } else {
                    Write::Value(format!("ledger:{name}:{}", number % KEYS_PER_WRITER), number)
                }
            })
            .collect();
        let commands: Vec<Vec<String>> = writes
            .iter()
            .map(|write| match write {
                Write::Value(key, value) => vec!["SET".to_owned(), key.clone(), value.to_string()],
                Write::Count(key) => vec!["INCR".to_owned(), key.clone()],
            })
            .collect();
        for write in &writes {
            ledger.attempt(write);
        }
        let packet: Vec<u8> = commands.iter().flat_map(|command| crate::resp::command(command)).collect();
        let mut healthy = open.send(&packet).is_ok();
        for write in &writes {
            if !healthy {
                break;
            }
            match open.read_value() {
                Ok(Value::Error(text)) => {
                    ledger.errors += 1;
                    ledger.last_error = Some(String::from_utf8_lossy(&text).into_owned());
                }
                Ok(_) => {
                    ledger.acknowledge(write);
                    acknowledged.fetch_add(1, Ordering::Relaxed);
                }
                Err(_) => healthy = false,
            }
        }
        if !healthy {
            ledger.breaks += 1;
            connection = None;
        }
    }
    ledger
}

impl Ledger {
    /// From now on the write may be there.
    fn attempt(&mut self, write: &Write) {
        match write {
            Write::Value(key, value) => self.values.entry(key.clone()).or_default().unknown.push(*value),
            Write::Count(key) => self.counters.entry(key.clone()).or_default().unknown += 1,
        }
    }

    /// From now on the write must be there.
    fn acknowledge(&mut self, write: &Write) {
        match write {
            Write::Value(key, value) => {
                let entry = self.values.entry(key.clone()).or_default();
                entry.acknowledged = Some(*value);
                // What was written before this one cannot come back.
                entry.unknown.retain(|other| other > value);
            }
            Write::Count(key) => {
                let counter = self.counters.entry(key.clone()).or_default();
                counter.acknowledged += 1;
                counter.unknown -= 1;
            }
        }
    }

    /// The number of keys with something acknowledged.
    pub fn acknowledged_keys(&self) -> usize {
        let values = self.values.values().filter(|entry| entry.acknowledged.is_some());
        let counters = self.counters.values().filter(|counter| counter.acknowledged > 0);
        values.count() + counters.count()
    }

    /// Reads everything back; panics with what is lost, stale or counted wrongly.
    pub fn check(&self, connection: &mut Connection) {
        let mut wrong = Vec::new();
        for (key, entry) in &self.values {
            let value = connection.done(&["GET", key]);
            let found: Option<u64> = value.bytes().and_then(|bytes| std::str::from_utf8(bytes).ok()?.parse().ok());
            let right = found == entry.acknowledged || found.is_some_and(|found| entry.unknown.contains(&found));
            if !right {
                wrong.push(format!("{key} holds {found:?}, expected {entry:?}"));
            }
        }
        for (key, counter) in &self.counters {
            let value = connection.done(&["GET", key]);
            let found: u64 = match value.bytes() {
                Some(bytes) => String::from_utf8_lossy(bytes).parse().unwrap_or(u64::MAX),
                None => 0,
            };
            if !(counter.acknowledged..=counter.acknowledged + counter.unknown).contains(&found) {
                wrong.push(format!("{key} counts {found}, expected {counter:?}"));
            }
        }
        assert!(
            wrong.is_empty(),
            "{} of {} keys are wrong:\n{}",
            wrong.len(),
            self.values.len() + self.counters.len(),
            wrong.iter().take(20).cloned().collect::<Vec<_>>().join("\n")
        );
    }
}
