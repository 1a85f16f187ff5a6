//! MSET and MGET of keys of all shards: what one wrote the other finds, whichever gateway it asks.

use redis_tests::Value;

use super::{Caller, Findings, Reply};

/// Enough that each of a few shards has several.
const KEYS: usize = 40;

pub fn write_and_read(mut caller: Caller) -> Findings {
    let keys: Vec<String> = (0..KEYS).map(|number| format!("batch:{number}")).collect();
    let mut acknowledged: Option<u64> = None;
    // Of these any key may hold any, at any later time.
    let mut unknown: Vec<u64> = Vec::new();
    let mut number = 0;
    while !caller.is_stopped() {
        number += 1;
        let mut command = vec!["MSET".to_owned()];
        command.extend(keys.iter().flat_map(|key| [key.clone(), number.to_string()]));
        match caller.ask(&command) {
            Reply::Value(reply) if reply == Value::ok() => acknowledged = Some(number),
            Reply::Value(reply) => caller.wrong(format!("MSET was answered {reply:?}")),
            // A part of it may have been executed.
            Reply::NotExecuted | Reply::Unknown => unknown.push(number),
        }
        caller.go_to_another_gateway();
        let mut command = vec!["MGET".to_owned()];
        command.extend(keys.iter().cloned());
        let Some(values) = caller.read(&command) else { break };
        let values = values.elements().unwrap_or_default();
        if values.len() != KEYS {
            caller.wrong(format!("MGET of {KEYS} keys answered {}", values.len()));
        }
        for (key, value) in keys.iter().zip(&values) {
            let found: Option<u64> = value.bytes().and_then(|bytes| std::str::from_utf8(bytes).ok()?.parse().ok());
            if found != acknowledged && found.is_none_or(|found| !unknown.contains(&found)) {
                caller.wrong(format!("{key} is {found:?}, acknowledged {acknowledged:?}, unknown {unknown:?}"));
            }
        }
        caller.pause();
    }
    caller.findings
}
