//! SCAN from the beginning to the end, each page from whichever gateway, and the commands that ask all shards at once.

use std::collections::HashSet;

use redis_tests::Value;

use super::{Caller, Findings, STAYING, staying};

/// No walk over these keys has so many pages unless it runs in a circle.
const PAGES_MAX: usize = 50_000;

/// Of those that stay, all must be counted; so many at a time.
const COUNTED: usize = 60;

pub fn walk(mut caller: Caller) -> Findings {
    let all: HashSet<String> = (0..STAYING).map(staying).collect();
    while !caller.is_stopped() {
        let options = match caller.random.u8(..3) {
            0 => &["COUNT", "1000"][..],
            1 => &["COUNT", "50"],
            _ => &["MATCH", "staying:*", "COUNT", "100"],
        };
        if let Some(found) = whole_walk(&mut caller, options) {
            caller.findings.walks += 1;
            judge(&mut caller, &format!("SCAN {options:?}"), &all, &found);
        }
        ask_all_shards(&mut caller, &all);
    }
    caller.findings
}

/// `None` if it was to stop before the end.
fn whole_walk(caller: &mut Caller, options: &[&str]) -> Option<Vec<String>> {
    let mut found = Vec::new();
    let mut cursor = "0".to_owned();
    for _ in 0..PAGES_MAX {
        let mut command = vec!["SCAN", &cursor];
        command.extend_from_slice(options);
        let page = caller.read(&command)?.elements().unwrap_or_default();
        let [next, keys] = page.as_slice() else {
            caller.wrong(format!("a page of SCAN is {page:?}"));
            return None;
        };
        found.extend(keys.elements().unwrap_or_default().iter().map(Value::text));
        cursor = next.text();
        if cursor == "0" {
            return Some(found);
        }
        if caller.random.u8(..8) == 0 {
            caller.go_to_another_gateway();
        }
        caller.pause();
    }
    caller.wrong(format!("SCAN {options:?} does not end"));
    None
}

fn judge(caller: &mut Caller, what: &str, all: &HashSet<String>, found: &[String]) {
    let found: HashSet<&str> = found.iter().map(String::as_str).collect();
    let missed: Vec<&String> = all.iter().filter(|key| !found.contains(key.as_str())).collect();
    if !missed.is_empty() {
        caller.wrong(format!("{what} missed {} keys, such as {:?}", missed.len(), missed[0]));
    }
    if let Some(back) = found.iter().find(|key| key.starts_with("gone:")) {
        caller.wrong(format!("{what} showed {back}, which was deleted"));
    }
}

/// Every shard is asked once, and no row is counted that lies with two of them.
fn ask_all_shards(caller: &mut Caller, all: &HashSet<String>) {
    if let Some(keys) = caller.read(&["KEYS", "staying:*"]) {
        let keys: Vec<String> = keys.elements().unwrap_or_default().iter().map(Value::text).collect();
        judge(caller, "KEYS", all, &keys);
        if keys.len() > all.len() {
            caller.wrong(format!("KEYS found {} of {} keys", keys.len(), all.len()));
        }
    }
    if let Some(count) = caller.read(&["DBSIZE"])
        && count.integer().is_none_or(|count| count < all.len() as i64)
    {
        caller.wrong(format!("DBSIZE is {}, of {} keys at least", count.text(), all.len()));
    }
    let first = caller.random.usize(..STAYING - COUNTED);
    let mut command = vec!["EXISTS".to_owned()];
    command.extend((first..first + COUNTED).map(staying));
    if let Some(count) = caller.read(&command)
        && count != Value::Integer(COUNTED as i64)
    {
        caller.wrong(format!("EXISTS of {COUNTED} keys is {}", count.text()));
    }
    if let Some(key) = caller.read(&["RANDOMKEY"])
        && key.bytes().is_none_or(|key| key.starts_with(b"gone:"))
    {
        caller.wrong(format!("RANDOMKEY is {}", key.text()));
    }
}
