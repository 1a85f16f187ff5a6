//! Event times that clients give, against a model: across restarts, crashes and compactions, with tombstones that stay and that leave.

use super::tests::{Client, copy_folder, open, shard};
use crate::StoreHandle;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;
use tempfile::TempDir;
use vasto_proto::row::{RowKind, Stamp};

/// One shard and a connection to it, over all that may happen to its process.
struct Life {
    folder: TempDir,
    data: PathBuf,
    gc_grace: Duration,
    /// `None` only while one follows the other.
    running: Option<(StoreHandle, Client)>,
    crashes: u32,
}

impl Life {
    fn new(gc_grace: Duration) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("0");
        let mut life = Self { folder, data, gc_grace, running: None, crashes: 0 };
        life.restart();
        life
    }

    fn handle(&self) -> &StoreHandle {
        &self.running.as_ref().unwrap().0
    }

    fn call(&mut self, line: &str) -> String {
        let words: Vec<&[u8]> = line.split(' ').map(str::as_bytes).collect();
        self.running.as_mut().unwrap().1.call(&words)
    }

    fn restart(&mut self) {
        if let Some((handle, client)) = self.running.take() {
            drop(client);
            handle.close();
        }
        let handle = open(&self.data, |config| config.gc_grace = self.gc_grace);
        let client = Client::new(&handle);
        self.running = Some((handle, client));
    }

    /// Goes on with what a killed process leaves.
    fn crash(&mut self) {
        self.crashes += 1;
        let copy = self.folder.path().join(self.crashes.to_string());
        copy_folder(&self.data, &copy);
        self.data = copy;
        self.restart();
    }
}

#[derive(Clone, Debug)]
enum Step {
    Set { key: u8, value: u8, time: u64, expired: bool },
    Delete { key: u8, time: u64 },
    PlainSet { key: u8, value: u8 },
    PlainDelete { key: u8 },
    Flush,
    Compact,
    Restart,
    Crash,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let (key, value, time) = (0..4u8, 0..3u8, 1..12u64);
    let step = prop_oneof![
        40 => (key.clone(), value.clone(), time.clone(), prop::bool::weighted(0.2))
            .prop_map(|(key, value, time, expired)| Step::Set { key, value, time, expired }),
        20 => (key.clone(), time).prop_map(|(key, time)| Step::Delete { key, time }),
        2 => (key.clone(), value).prop_map(|(key, value)| Step::PlainSet { key, value }),
        2 => key.prop_map(|key| Step::PlainDelete { key }),
        1 => Just(Step::Flush),
        6 => Just(Step::Compact),
        2 => Just(Step::Restart),
        2 => Just(Step::Crash),
    ];
    prop::collection::vec(step, 1..60)
}

/// The newest write of a key: its stamp and what a client sees.
type Newest = (Stamp, Option<u8>);

/// A stamp of the store's own, above every event time here.
const DRAWN: Stamp = Stamp { ns: u64::MAX, origin: 1, sequence: 1 };

const TOO_OLD: &str = "-TOOOLD";

/// Applies a write with an event time to the model and returns the answer it must have.
fn apply(model: &mut BTreeMap<u8, Newest>, is_flushed: bool, key: u8, new: Newest, is_delete: bool) -> &'static str {
    let old = model.get(&key).copied();
    let older = is_flushed || old.is_some_and(|(stamp, _)| stamp > new.0);
    let existed = old.is_some_and(|(_, seen)| seen.is_some());
    if !older {
        model.insert(key, new);
    }
    match (is_delete, older) {
        (false, false) => "OK",
        (false, true) => "null",
        (true, false) if existed => "1",
        (true, _) => "0",
    }
}

fn run(steps: Vec<Step>, gc_grace: Duration) -> Result<(), TestCaseError> {
    let mut life = Life::new(gc_grace);
    let mut model: BTreeMap<u8, Newest> = BTreeMap::new();
    let mut is_flushed = false;
    for step in steps {
        let (line, expected) = match step {
            Step::Set { key, value, time, expired } => {
                let (expires_at_ms, option) = if expired { (1, " PXAT 1") } else { (0, "") };
                let stamp = Stamp::given(time, RowKind::String, expires_at_ms, value.to_string().as_bytes());
                let line = format!("set k{key} {value} EVENTTIME {time}{option}");
                // Where nothing is stored any more the store may not know: then it changes nothing and says so.
                let before = model.clone();
                let expected = apply(&mut model, is_flushed, key, (stamp, (!expired).then_some(value)), false);
                let answer = life.call(&line);
                if answer.starts_with(TOO_OLD) && gc_grace.is_zero() {
                    prop_assert!(
                        before.get(&key).is_none_or(|(_, seen)| seen.is_none()),
                        "{line} although k{key} exists"
                    );
                    model = before;
                } else {
                    prop_assert_eq!(answer, expected, "{}", line);
                }
                continue;
            }
            Step::Delete { key, time } => {
                let stamp = Stamp::given(time, RowKind::Tombstone, 0, b"");
                let expected = apply(&mut model, is_flushed, key, (stamp, None), true);
                (format!("del k{key} EVENTTIME {time}"), expected)
            }
            Step::PlainSet { key, value } => {
                model.insert(key, (DRAWN, Some(value)));
                (format!("set k{key} {value}"), "OK")
            }
            Step::PlainDelete { key } => {
                let existed = model.get(&key).is_some_and(|(_, seen)| seen.is_some());
                model.insert(key, (DRAWN, None));
                (format!("del k{key}"), if existed { "1" } else { "0" })
            }
            Step::Flush => {
                model.clear();
                is_flushed = true;
                ("flushdb".to_owned(), "OK")
            }
            Step::Compact => {
                life.handle().compact();
                continue;
            }
            Step::Restart => {
                life.restart();
                continue;
            }
            Step::Crash => {
                life.crash();
                continue;
            }
        };
        prop_assert_eq!(life.call(&line), expected, "{}", line);
        for key in 0..4 {
            let seen = model.get(&key).and_then(|(_, seen)| *seen).map_or("null".to_owned(), |value| value.to_string());
            prop_assert_eq!(life.call(&format!("get k{key}")), seen, "after {}", line);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn the_newest_event_time_is_what_is_seen(steps in steps()) {
        run(steps, Duration::from_secs(3600))?;
    }

    /// Tombstones leave at the first compaction: no deleted value comes back all the same.
    #[test]
    fn nothing_comes_back_when_tombstones_have_left(steps in steps()) {
        run(steps, Duration::ZERO)?;
    }
}

/// Compaction makes a tombstone of it, which has its stamp.
#[test]
fn a_write_that_has_expired_is_the_same_write_after_a_compaction() {
    let mut life = Life::new(Duration::from_secs(3600));
    for _ in 0..2 {
        assert_eq!(life.call("set k v EVENTTIME 10 PXAT 1"), "OK");
        assert_eq!(life.call("set k v EVENTTIME 9"), "null");
        life.handle().compact();
    }
    // Another one of that event time is not.
    assert_eq!(life.call("del k EVENTTIME 10"), "0");
    assert_eq!(life.call("set k v EVENTTIME 10 PXAT 1"), "null");
    assert_eq!(life.call("get k"), "null");
}

#[test]
fn what_was_forgotten_is_refused_and_not_guessed() {
    let mut life = Life::new(Duration::ZERO);
    life.call("set k v EVENTTIME 100");
    life.call("del k EVENTTIME 200");
    life.call("set gone v PXAT 1 EVENTTIME 150");
    life.handle().compact();
    for _ in 0..2 {
        // What was dropped is known after a crash as well.
        life.crash();
        let too_old = "-TOOOLD the key has no row and the event time is not above those of deletions that are forgotten; \
                       nothing was written";
        for line in
            ["set k v EVENTTIME 200", "set gone v EVENTTIME 1", "set never v EVENTTIME 199", "setex k 9 v EVENTTIME 5"]
        {
            assert_eq!(life.call(line), too_old, "{line}");
        }
        assert_eq!(life.call("mget k gone never"), "null,null,null");
        // A deletion that old holds anyway.
        assert_eq!(life.call("del k EVENTTIME 150"), "0");
        assert_eq!(life.call("expire k 10 EVENTTIME 150"), "0");
    }
    assert_eq!(shard(life.handle()).database.estimate_keys(), 0);
    assert_eq!(life.call("set k new EVENTTIME 201"), "OK");
    assert_eq!(life.call("set k newer EVENTTIME 202"), "OK");
    assert_eq!(life.call("set k old EVENTTIME 201"), "null");
    assert_eq!(life.call("get k"), "newer");
}

/// The bound of the stamps covers what clients gave, so that a restart draws above it.
#[test]
fn a_plain_write_after_a_crash_wins_over_an_event_time_ahead_of_the_clock() {
    let mut life = Life::new(Duration::from_secs(3600));
    for round in 0..5 {
        let given = super::executor::now_ns() + 450_000_000;
        // A key of its own: after a crash the shard's time may be seconds ahead of the clock.
        assert_eq!(life.call(&format!("set k{round} given EVENTTIME {given}")), "OK");
        life.crash();
        assert_eq!(life.call(&format!("get k{round}")), "given");
        assert_eq!(life.call(&format!("set k{round} plain")), "OK");
        assert_eq!(life.call(&format!("set k{round} again EVENTTIME {given}")), "null");
        assert_eq!(life.call(&format!("get k{round}")), "plain");
    }
}
