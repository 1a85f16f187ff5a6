//! MULTI and EXEC: two counters of one transaction never part; with WATCH, a number is raised by whoever read it last.

use redis_tests::Value;

use super::{Caller, Findings, Reply};

pub fn transact(mut caller: Caller) -> Findings {
    let (mut pairs, mut watched) = (0, 0);
    let mut count = 0;
    let mut number = 0;
    while !caller.is_stopped() {
        if caller.random.bool() {
            match raise_pair(&mut caller, pairs) {
                Some(reply) => {
                    count += 1;
                    let expected = Value::Array(vec![Value::Integer(count), Value::Integer(count)]);
                    if reply != expected {
                        caller.wrong(format!("EXEC answered {reply:?}, the pair was raised {count} times"));
                        (pairs, count) = (pairs + 1, 0);
                    }
                }
                // What they count now nobody knows.
                None => (pairs, count) = (pairs + 1, 0),
            }
        } else {
            match raise_watched(&mut caller, watched, number) {
                Some(true) => number += 1,
                Some(false) => {}
                None => (watched, number) = (watched + 1, 0),
            }
        }
        if caller.random.u8(..8) == 0 {
            caller.go_to_another_gateway();
        }
        caller.pause();
    }
    caller.findings
}

/// The answer of EXEC; `None` if there is none.
fn raise_pair(caller: &mut Caller, pair: u32) -> Option<Value> {
    let (one, two) = (format!("{{pair:{pair}}}:1"), format!("{{pair:{pair}}}:2"));
    execute(caller, &[vec!["MULTI"], vec!["INCR", &one], vec!["INCR", &two], vec!["EXEC"]])
}

/// Whether it was raised; another client has not touched it, but who serves it may have changed. `None` if nobody knows.
fn raise_watched(caller: &mut Caller, watched: u32, number: u64) -> Option<bool> {
    let key = format!("watched:{watched}");
    let Reply::Value(_) = caller.ask(&["WATCH", &key]) else { return None };
    let Reply::Value(found) = caller.ask(&["GET", &key]) else {
        // What it watches would fail the next transaction.
        caller.connection = None;
        return None;
    };
    let expected = if number == 0 { Value::Nil } else { Value::bulk(number.to_string()) };
    if found != expected {
        caller.wrong(format!("{key} is {}, {number} was set", found.text()));
        return None;
    }
    let next = (number + 1).to_string();
    let reply = execute(caller, &[vec!["MULTI"], vec!["SET", &key, &next], vec!["EXEC"]])?;
    match reply {
        Value::Nil => Some(false),
        reply if reply == Value::Array(vec![Value::ok()]) => Some(true),
        reply => {
            caller.wrong(format!("EXEC of SET {key} answered {reply:?}"));
            None
        }
    }
}

/// All in one packet: the answer of the last of them.
fn execute(caller: &mut Caller, commands: &[Vec<&str>]) -> Option<Value> {
    let replies = caller.connection().pipeline(commands);
    let reply = replies.map(|mut replies| replies.pop().unwrap_or(Value::Nil));
    match caller.sort_out(b"EXEC", reply) {
        Reply::Value(value) => Some(value),
        Reply::NotExecuted | Reply::Unknown => {
            // A transaction that was not executed may have left the connection in the middle of it.
            caller.connection = None;
            None
        }
    }
}
