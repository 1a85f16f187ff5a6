//! The one line on standard output that says a process serves, and waiting for what it promises.

use std::fmt::Display;
use std::io::Write;
use std::sync::Arc;

use anyhow::Context;
use tokio::sync::watch;
use tracing::info;
use vasto_proto::id::KeyspaceId;
use vasto_proto::topology::Snapshot;

use crate::telemetry::Metrics;

/// What `SELECT 0` means; clients start there.
const FIRST_KEYSPACE: KeyspaceId = KeyspaceId(0);

/// `vasto ROLE ready: NAME VALUE, NAME VALUE…`
#[derive(Debug)]
pub struct ReadyLine(String);

impl ReadyLine {
    pub fn new(role: &str) -> Self {
        Self(format!("vasto {role} ready:"))
    }

    pub fn with(mut self, name: &str, value: impl Display) -> Self {
        let separator = if self.0.ends_with(':') { "" } else { "," };
        self.0 = format!("{}{separator} {name} {value}", self.0);
        self
    }

    pub fn with_all<T: Display>(self, name: &str, values: impl IntoIterator<Item = T>) -> Self {
        values.into_iter().fold(self, |line, value| line.with(name, value))
    }

    pub fn with_metrics(self, metrics: &Metrics) -> Self {
        self.with_all("metrics", metrics.address())
    }

    pub fn print(self) -> anyhow::Result<()> {
        let mut output = std::io::stdout().lock();
        let written = writeln!(output, "{}", self.0).and_then(|()| output.flush());
        written.context("write to standard output")
    }
}

/// Returns when keyspace 0 is served; until then logs what is missing, once per change.
pub async fn wait_until_served(mut topology: watch::Receiver<Arc<Snapshot>>) {
    let mut before = String::new();
    loop {
        let lacking = lacking(&topology.borrow_and_update());
        let Some(lacking) = lacking else { return };
        if lacking != before {
            info!("waiting: {lacking}");
            before = lacking;
        }
        if topology.changed().await.is_err() {
            // The follower has stopped, which it does at shutdown only.
            return std::future::pending().await;
        }
    }
}

/// What is missing until keyspace 0 is served, in words.
fn lacking(snapshot: &Snapshot) -> Option<String> {
    let Some(keyspace) = snapshot.keyspace(FIRST_KEYSPACE) else {
        let reason = snapshot.waiting_for.as_str();
        return Some(if reason.is_empty() { "no master has answered yet".to_owned() } else { reason.to_owned() });
    };
    let is_up = |store| snapshot.store(store).is_some_and(|store| store.up);
    let mut down: Vec<_> =
        keyspace.shards.iter().map(|shard| shard.primary).filter(|primary| !is_up(*primary)).collect();
    down.sort_unstable();
    down.dedup();
    if down.is_empty() {
        return None;
    }
    let down: Vec<String> = down.iter().map(ToString::to_string).collect();
    Some(format!("stores with shards of keyspace {} are down: {}", keyspace.name, down.join(", ")))
}

#[cfg(test)]
mod tests {

    use super::*;
    use vasto_proto::id::StoreId;
    use vasto_proto::topology::{KeyspaceRecord, StoreInfo};

    #[test]
    fn the_line_names_what_there_is() {
        let line = ReadyLine::new("gateway").with_all("redis", ["a:1", "b:2"]).with_all("unixsocket", Some("/s"));
        assert_eq!(
            line.with_metrics(&Metrics::default()).0,
            "vasto gateway ready: redis a:1, redis b:2, unixsocket /s"
        );
    }

    #[test]
    fn what_is_lacking_is_said() {
        let mut snapshot = Snapshot::default();
        assert_eq!(lacking(&snapshot).as_deref(), Some("no master has answered yet"));
        snapshot.waiting_for = "1 of 2 stores".to_owned();
        assert_eq!(lacking(&snapshot).as_deref(), Some("1 of 2 stores"));
        let store = |id, up| StoreInfo {
            id: StoreId(id),
            address: String::new(),
            up,
            free_disk_bytes: 0,
            fsync: None,
            zone: String::new(),
            tags: Vec::new(),
        };
        snapshot.stores = vec![store(1, true), store(2, false)];
        let primaries = [2, 1, 2].map(StoreId);
        snapshot.keyspaces = vec![KeyspaceRecord::new(FIRST_KEYSPACE, "0", &primaries).unwrap()];
        let text = "stores with shards of keyspace 0 are down: 00000002";
        assert_eq!(lacking(&snapshot).as_deref(), Some(text));
        snapshot.stores[1].up = true;
        assert_eq!(lacking(&snapshot), None);
    }
}
