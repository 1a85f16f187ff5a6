//! Resizing a keyspace and replacing a store as an operator asks for it: by a verb, then by looking at its status until it ends.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use redis_tests::eventually::{eventually_within, pause};
use redis_tests::slots::shard_of;
use redis_tests::{Address, Connection, Value};

use super::{KEYSPACE, RECOVERY_PATIENCE, Trial, wait_until_whole};

/// From the verb to the end, whatever dies on the way, on a machine that does much else.
pub const END_PATIENCE: Duration = Duration::from_secs(180);

/// Between two looks at the status.
const LOOK_PAUSE: Duration = Duration::from_millis(25);

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    Done,
    Aborted(String),
}

/// What KEYSPACE STATUS answers.
#[derive(Clone, Debug)]
pub struct Status(Value);

impl Status {
    pub fn text(&self, name: &str) -> String {
        self.0.field(name).map(|value| value.text()).unwrap_or_default()
    }

    pub fn number(&self, name: &str) -> Option<i64> {
        self.0.field(name).and_then(|value| value.integer())
    }

    pub fn phase(&self) -> String {
        self.text("phase")
    }

    /// Which operation it tells of.
    pub fn operation(&self) -> String {
        self.text("operation")
    }

    pub fn end(&self) -> Option<End> {
        match self.phase().as_str() {
            "done" => Some(End::Done),
            "aborted" => Some(End::Aborted(self.text("reason"))),
            _ => None,
        }
    }

    /// Its fields in one line, without those that are maps.
    pub fn line(&self) -> String {
        let elements = self.0.elements().unwrap_or_default();
        let plain = elements.chunks_exact(2).filter(|pair| pair[1].elements().is_none());
        plain.map(|pair| format!("{}={}", pair[0].text(), pair[1].text())).collect::<Vec<_>>().join(" ")
    }
}

pub fn status(connection: &mut Connection, keyspace: &str) -> Result<Status, String> {
    let reply = connection.try_call(&["KEYSPACE", "STATUS", keyspace]).map_err(|error| error.to_string())?;
    if reply.is_error() { Err(reply.text()) } else { Ok(Status(reply)) }
}

/// One that was asked for: which one was the last before it.
pub struct Operation {
    what: String,
    before: String,
    begun: Instant,
}

/// Asks by this verb, which must not be refused; the words behind KEYSPACE.
pub fn begin(connection: &mut Connection, keyspace: &str, words: &[&str]) -> Operation {
    let what = format!("KEYSPACE {}", words.join(" "));
    let before = operation_before(connection, keyspace);
    let mut command = vec!["KEYSPACE"];
    command.extend_from_slice(words);
    let begun = Instant::now();
    connection.done(&command);
    Operation { what, before, begun }
}

/// Nothing is told of a keyspace with which nothing was done yet.
fn operation_before(connection: &mut Connection, keyspace: &str) -> String {
    status(connection, keyspace).map(|status| status.operation()).unwrap_or_default()
}

/// Looks until it has ended, and does `meanwhile` between looks; the last status that told of rows, if any did, and how it ended.
pub fn follow(
    mut connection: impl FnMut() -> Result<Connection, String>,
    keyspace: &str,
    operation: &Operation,
    mut meanwhile: impl FnMut(Option<&Status>),
) -> (Status, End) {
    let mut open = None;
    let mut moving: Option<Status> = None;
    let what = format!("{} ends", operation.what);
    eventually_within(END_PATIENCE, &what, || {
        pause(LOOK_PAUSE);
        let told = match open.take() {
            Some(connection) => Ok(connection),
            None => connection(),
        };
        let told = told.and_then(|mut connection| {
            let told = status(&mut connection, keyspace);
            open = Some(connection);
            told
        });
        let status = match told {
            Ok(status) => status,
            Err(reason) => {
                open = None;
                meanwhile(None);
                return Err(reason);
            }
        };
        if status.operation() == operation.before {
            return Err(status.line());
        }
        meanwhile(Some(&status));
        if status.number("bytes").is_some_and(|bytes| bytes > 0) {
            moving = Some(status.clone());
        }
        let end = status.end().ok_or_else(|| status.line())?;
        Ok((moving.clone().unwrap_or(status), end))
    })
}

impl Trial {
    /// Gives the keyspace so many shards, which must end well.
    pub fn resize(&mut self, shards: usize) -> Status {
        let operation = self.begin_operation(&["RESIZE", KEYSPACE, "SHARDS", &shards.to_string()]);
        let (status, end) = self.follow_operation(&operation, |_| ());
        assert_eq!(end, End::Done, "{}", status.line());
        self.wait_for_shards(shards);
        status
    }

    pub fn begin_operation(&mut self, words: &[&str]) -> Operation {
        self.event(format!("KEYSPACE {}", words.join(" ")));
        begin(&mut self.cluster.connect(0), KEYSPACE, words)
    }

    /// The same where the master may be away: asked for again until it is under way, or at its end.
    pub fn insist_on_operation(&mut self, words: &[&str], mut meanwhile: impl FnMut(&mut Trial)) -> Operation {
        self.event(format!("KEYSPACE {}", words.join(" ")));
        let begun = Instant::now();
        let mut command = vec!["KEYSPACE"];
        command.extend_from_slice(words);
        let before = operation_before(&mut self.cluster.connect(0), KEYSPACE);
        eventually_within(RECOVERY_PATIENCE, &format!("{words:?} is accepted"), || {
            meanwhile(self);
            let mut connection = Connection::try_open(&self.cluster.address(0)).map_err(|error| error.to_string())?;
            let reply = connection.try_call(&command).map_err(|error| error.to_string())?;
            let mut is_known = || status(&mut connection, KEYSPACE).is_ok_and(|status| status.operation() != before);
            if !reply.is_error() || is_known() { Ok(()) } else { Err(reply.text()) }
        });
        Operation { what: words.join(" "), before, begun }
    }

    pub fn follow_operation(&mut self, operation: &Operation, mut meanwhile: impl FnMut(&mut Trial)) -> (Status, End) {
        let address = self.cluster.address(0);
        let connect = || Connection::try_open(&address).map_err(|error| error.to_string());
        let mut phase = String::new();
        let (status, end) = follow(connect, KEYSPACE, operation, |status| {
            if let Some(status) = status.filter(|status| status.phase() != phase) {
                phase = status.phase();
                self.event(format!("phase {phase}"));
            }
            meanwhile(self);
        });
        eprintln!("  {:.2} s: {}", operation.begun.elapsed().as_secs_f64(), status.line());
        (status, end)
    }

    /// Both gateways see so many shards, all with their copies; nothing is left of others.
    pub fn wait_for_shards(&self, shards: usize) {
        for gateway in 0..self.cluster.gateways.len() {
            let what = format!("gateway-{gateway} knows {shards} shards");
            eventually_within(RECOVERY_PATIENCE, &what, || {
                let mut connection = self.cluster.connect(gateway);
                let places = self.cluster.places(&mut connection, KEYSPACE)?;
                if places.len() == shards { Ok(()) } else { Err(format!("{places:?}")) }
            });
        }
        wait_until_whole(&self.cluster, KEYSPACE, self.safety);
        eventually_within(RECOVERY_PATIENCE, "nothing is left behind", || self.leftovers());
    }

    /// Folders of copies that no record names, and copies without one.
    pub fn leftovers(&self) -> Result<(), String> {
        let mut connection = self.cluster.connect(0);
        let info = connection.call(&["KEYSPACE", "INFO", KEYSPACE]);
        let id = info.field("id").and_then(|id| id.integer()).ok_or_else(|| info.text())?;
        let mut expected = BTreeSet::new();
        for place in self.cluster.places(&mut connection, KEYSPACE)? {
            let stores = place.primary.into_iter().chain(place.replicas);
            expected.extend(stores.map(|store| (store, format!("{id}-{}", place.shard))));
        }
        let mut found = BTreeSet::new();
        for store in 0..self.cluster.stores.len() {
            let Ok(entries) = std::fs::read_dir(self.cluster.data(store).join("shards")) else { continue };
            let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
            let of_keyspace = names.filter(|name| name.trim_start_matches('.').starts_with(&format!("{id}-")));
            found.extend(of_keyspace.map(|name| (store, name)));
        }
        if found == expected { Ok(()) } else { Err(format!("folders {found:?}, expected {expected:?}")) }
    }
}

/// The bytes of keys and values of those that change their shard.
pub fn bytes_that_move(keys: impl Iterator<Item = (String, usize)>, from: usize, to: usize) -> usize {
    let moving = keys.filter(|(key, _)| shard_of(key, from) != shard_of(key, to));
    moving.map(|(key, bytes)| key.len() + bytes).sum()
}

/// A keyspace beside the load's.
pub fn resize_quietly(address: &Address, keyspace: &str, shards: usize) -> (Status, End) {
    let mut connection = Connection::open(address);
    let operation = begin(&mut connection, keyspace, &["RESIZE", keyspace, "SHARDS", &shards.to_string()]);
    follow(|| Connection::try_open(address).map_err(|error| error.to_string()), keyspace, &operation, |_| ())
}
