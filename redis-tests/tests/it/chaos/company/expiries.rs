//! Keys with times to live: there until then, and not a moment longer, whoever has them by then.

use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime};

use redis_tests::Value;

use super::{Caller, Findings, Reply};

/// Keys that live longer than any test.
pub const LASTING: usize = 200;

/// Keys that are looked at before and after their end.
const OPEN_MAX: usize = 60;

const MILLISECONDS: std::ops::Range<u64> = 100..3_000;

/// A time to live is counted in whole milliseconds.
const SLACK: Duration = Duration::from_millis(5);

pub fn lasting(number: usize) -> String {
    format!("lasting:{number}")
}

/// In ms since 1970, the same each time it is asked: tomorrow, by a clock that is read once.
pub fn lasts_until(number: usize) -> i64 {
    static TOMORROW: std::sync::OnceLock<i64> = std::sync::OnceLock::new();
    let tomorrow = TOMORROW.get_or_init(|| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        now.as_millis() as i64 + 24 * 3_600_000
    });
    tomorrow + number as i64
}

struct Expiry {
    key: String,
    /// It is there if the answer comes before this …
    until: Instant,
    /// … and gone if it is asked for after this.
    gone_from: Instant,
}

pub fn set_and_wait(mut caller: Caller) -> Findings {
    let mut open: VecDeque<Expiry> = VecDeque::new();
    let mut number = 0;
    while !caller.is_stopped() {
        if open.len() < OPEN_MAX {
            number += 1;
            let key = format!("expiry:{number}");
            let time = Duration::from_millis(caller.random.u64(MILLISECONDS));
            let before = Instant::now();
            let reply = caller.ask(&["SET", &key, "short", "PX", &time.as_millis().to_string()]);
            if let Reply::Value(_) = reply {
                open.push_back(Expiry { key, until: before + time - SLACK, gone_from: Instant::now() + time + SLACK });
            }
        }
        let Some(expiry) = open.pop_front() else { continue };
        let asked = Instant::now();
        let Some(value) = caller.read(&["GET", &expiry.key]) else { break };
        let answered = Instant::now();
        if answered < expiry.until && value != Value::bulk("short") {
            let early = expiry.until - answered;
            caller.wrong(format!("{} is {} {early:?} before its end", expiry.key, value.text()));
        }
        if asked > expiry.gone_from {
            if value != Value::Nil {
                let late = asked - expiry.gone_from;
                caller.wrong(format!("{} is there {late:?} after its end", expiry.key));
            }
        } else {
            open.push_back(expiry);
        }
        caller.pause();
    }
    caller.findings
}
