//! What concurrent clients did to keys and what came back: recorded, timed, counted, shown around what is wrong.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::connection::{Address, Connection};
use crate::eventually::eventually_within;
use crate::resp::Value;

/// After a fault everything serves again within this time, on a machine that does much else.
const READ_BACK_PATIENCE: Duration = Duration::from_secs(90);

/// Operations that are shown before and after one that is wrong.
const SHOWN_OPERATIONS: usize = 12;

/// The client in whose name everything is read back at the end.
pub const READER: u32 = u32::MAX;

/// One command on one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Set(Vec<u8>),
    Get,
    Delete,
    Increment,
    Append(Vec<u8>),
}

impl Action {
    pub fn is_write(&self) -> bool {
        *self != Action::Get
    }

    pub fn words(&self, key: &str) -> Vec<Vec<u8>> {
        let key = key.as_bytes().to_vec();
        match self {
            Action::Set(value) => vec![b"SET".to_vec(), key, value.clone()],
            Action::Get => vec![b"GET".to_vec(), key],
            Action::Delete => vec![b"DEL".to_vec(), key],
            Action::Increment => vec![b"INCR".to_vec(), key],
            Action::Append(token) => vec![b"APPEND".to_vec(), key, token.clone()],
        }
    }
}

/// What a command says about the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Stored,
    Found(Option<Vec<u8>>),
    /// Of DEL, INCR and APPEND.
    Number(i64),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done(Answer),
    /// The answer says for certain that nothing was executed.
    NotExecuted,
    /// It may have taken effect at any time after it was sent, or never.
    Unknown,
}

/// Sorts out a reply; an `Err` is one that no client should ever see.
pub fn outcome_of(action: &Action, reply: &Value) -> Result<Outcome, String> {
    let answer = match (action, reply) {
        (_, Value::Error(_)) => return outcome_of_error(&reply.text()),
        (Action::Set(_), Value::Simple(text)) if text == b"OK" => Answer::Stored,
        (Action::Get, Value::Nil) => Answer::Found(None),
        (Action::Get, Value::Bulk(value)) => Answer::Found(Some(value.clone())),
        (Action::Delete | Action::Increment | Action::Append(_), Value::Integer(number)) => Answer::Number(*number),
        (Action::Set(_) | Action::Get | Action::Delete | Action::Increment | Action::Append(_), reply) => {
            return Err(format!("{action:?} was answered {reply:?}"));
        }
    };
    Ok(Outcome::Done(answer))
}

/// The code words by which errors tell what is known.
pub fn outcome_of_error(text: &str) -> Result<Outcome, String> {
    match text.split(' ').next().unwrap_or_default() {
        "UNKNOWN" => Ok(Outcome::Unknown),
        "CLUSTERDOWN" | "NOREPLICAS" | "MISCONF" | "LOADING" | "TRYAGAIN" => Ok(Outcome::NotExecuted),
        "ERR" if text.contains("nothing was executed") => Ok(Outcome::NotExecuted),
        _ => Err(text.to_owned()),
    }
}

#[derive(Clone, Debug)]
pub struct Operation {
    pub key: Arc<str>,
    pub client: u32,
    pub action: Action,
    /// Both since the start of the trial, by a clock that only goes on; before sending, after the answer.
    pub invoked: Duration,
    pub completed: Duration,
    pub outcome: Outcome,
}

impl Operation {
    pub fn is_done(&self) -> bool {
        matches!(self.outcome, Outcome::Done(_))
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let client = if self.client == READER { "reader".to_owned() } else { format!("client {}", self.client) };
        let command = crate::connection::shown(&self.action.words(&self.key));
        let outcome = match &self.outcome {
            Outcome::Done(Answer::Stored) => "OK".to_owned(),
            Outcome::Done(Answer::Found(None)) => "(nil)".to_owned(),
            Outcome::Done(Answer::Found(Some(value))) => String::from_utf8_lossy(value).into_owned(),
            Outcome::Done(Answer::Number(number)) => number.to_string(),
            Outcome::NotExecuted => "not executed".to_owned(),
            Outcome::Unknown => "unknown".to_owned(),
        };
        let (invoked, completed) = (self.invoked.as_secs_f64(), self.completed.as_secs_f64());
        write!(formatter, "{invoked:10.4} to {completed:10.4} s  {client:9}  {command} -> {outcome}")
    }
}

/// What was done to the cluster, and when.
#[derive(Clone, Debug)]
pub struct Event {
    pub at: Duration,
    pub what: String,
}

/// All operations of a load, and the answers that no client should see.
#[derive(Debug, Default)]
pub struct History {
    pub keys: BTreeMap<Arc<str>, Vec<Operation>>,
    pub unexpected: Vec<String>,
    /// Connections that broke.
    pub breaks: u64,
}

/// What a history came to in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub operations: usize,
    pub done: usize,
    pub not_executed: usize,
    pub unknown: usize,
}

impl Totals {
    /// Operations that were not answered as they should be.
    pub fn failed(&self) -> usize {
        self.not_executed + self.unknown
    }
}

impl History {
    pub fn add(&mut self, operation: Operation) {
        self.keys.entry(operation.key.clone()).or_default().push(operation);
    }

    pub fn absorb(&mut self, other: History) {
        for (key, operations) in other.keys {
            self.keys.entry(key).or_default().extend(operations);
        }
        self.unexpected.extend(other.unexpected);
        self.breaks += other.breaks;
    }

    fn operations(&self) -> impl Iterator<Item = &Operation> {
        self.keys.values().flatten()
    }

    pub fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        for operation in self.operations() {
            totals.operations += 1;
            match operation.outcome {
                Outcome::Done(_) => totals.done += 1,
                Outcome::NotExecuted => totals.not_executed += 1,
                Outcome::Unknown => totals.unknown += 1,
            }
        }
        totals
    }

    /// Reads every key once more, as an operation of its own; what it holds then.
    pub fn read_back(
        &mut self,
        address: &Address,
        keyspace: &str,
        start: Instant,
    ) -> BTreeMap<Arc<str>, Option<Vec<u8>>> {
        let keys: Vec<Arc<str>> = self.keys.keys().cloned().collect();
        let mut found = BTreeMap::new();
        let mut connection = None;
        for key in keys {
            let (invoked, value) = eventually_within(READ_BACK_PATIENCE, &format!("{key} is read back"), || {
                let invoked = start.elapsed();
                read(&mut connection, address, keyspace, &key).map(|value| (invoked, value))
            });
            self.add(Operation {
                key: key.clone(),
                client: READER,
                action: Action::Get,
                invoked,
                completed: start.elapsed(),
                outcome: Outcome::Done(Answer::Found(value.clone())),
            });
            found.insert(key, value);
        }
        found
    }

    /// Counters that were only ever incremented: each is at least what was acknowledged, at most that and what is unknown.
    /// Cheap, and independent of the search for a linearization.
    pub fn check_counters(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        for (key, operations) in &self.keys {
            let only_counts = operations.iter().all(|operation| match operation.action {
                Action::Increment | Action::Get => true,
                Action::Set(_) | Action::Delete | Action::Append(_) => false,
            });
            let increments = operations.iter().filter(|operation| operation.action == Action::Increment);
            let (mut acknowledged, mut unknown) = (0_i64, 0_i64);
            for increment in increments {
                acknowledged += i64::from(increment.is_done());
                unknown += i64::from(increment.outcome == Outcome::Unknown);
            }
            if !only_counts || acknowledged + unknown == 0 {
                continue;
            }
            let Some(Operation { outcome: Outcome::Done(Answer::Found(value)), client: READER, .. }) =
                operations.last()
            else {
                continue;
            };
            let text = value.as_deref().map_or("0".into(), String::from_utf8_lossy);
            let found: i64 = text.parse().unwrap_or(i64::MIN);
            if !(acknowledged..=acknowledged + unknown).contains(&found) {
                wrong.push(format!("{key} counts {text}: {acknowledged} acknowledged, {unknown} unknown"));
            }
        }
        wrong
    }

    /// How long the slowest share of the operations took that were answered in this time, such as 0.99: less than that share took no longer.
    pub fn quantile(&self, from: Duration, to: Duration, share: f64) -> Duration {
        let done = self.operations().filter(|operation| operation.client != READER && operation.is_done());
        let within = done.filter(|operation| operation.completed >= from && operation.completed < to);
        let mut times: Vec<Duration> = within.map(|operation| operation.completed - operation.invoked).collect();
        times.sort_unstable();
        let place = (times.len() as f64 * share) as usize;
        times.get(place.min(times.len().saturating_sub(1))).copied().unwrap_or_default()
    }

    /// The longest time for which a client asked for a key and no operation on it succeeded, of those that touch the window; it counts
    /// from the window's start, and to its own end even if that is after the window.
    pub fn unavailable(&self, from: Duration, to: Duration) -> Duration {
        self.keys.values().map(|operations| unavailable(operations, from, to)).max().unwrap_or_default()
    }
}

fn read(
    connection: &mut Option<Connection>,
    address: &Address,
    keyspace: &str,
    key: &str,
) -> Result<Option<Vec<u8>>, String> {
    let open = match connection.take() {
        Some(open) => open,
        None => open_in(address, keyspace)?,
    };
    // Put back only when it is healthy.
    let open = connection.insert(open);
    match open.try_call(&["GET", key]) {
        Ok(Value::Nil) => Ok(None),
        Ok(Value::Bulk(value)) => Ok(Some(value)),
        Ok(other) => Err(other.text()),
        Err(error) => {
            *connection = None;
            Err(error.to_string())
        }
    }
}

/// A connection that has chosen its keyspace.
pub fn open_in(address: &Address, keyspace: &str) -> Result<Connection, String> {
    let mut connection = Connection::try_open(address).map_err(|error| error.to_string())?;
    match connection.try_call(&["SELECT", keyspace]) {
        Ok(reply) if !reply.is_error() => Ok(connection),
        Ok(reply) => Err(reply.text()),
        Err(error) => Err(error.to_string()),
    }
}

fn unavailable(operations: &[Operation], from: Duration, to: Duration) -> Duration {
    let mut sorted: Vec<&Operation> = operations.iter().filter(|operation| operation.client != READER).collect();
    sorted.sort_by_key(|operation| operation.completed);
    let mut longest = Duration::ZERO;
    // When a client began to wait for the success that has not come yet.
    let mut waiting_since: Option<Duration> = None;
    let mut last_success = Duration::ZERO;
    for operation in sorted {
        let asked = operation.invoked.max(last_success);
        let since = waiting_since.map_or(asked, |since| since.min(asked));
        if operation.is_done() {
            if since < to {
                longest = longest.max(operation.completed.saturating_sub(since.max(from)));
            }
            last_success = operation.completed;
            waiting_since = None;
        } else {
            waiting_since = Some(since);
        }
    }
    // To the end of the last attempt: a key with several unknown operations is asked for no more, which says nothing of who serves it.
    if let Some(since) = waiting_since.filter(|since| *since < to)
        && let Some(last) = last_end(operations)
    {
        longest = longest.max(last.saturating_sub(since.max(from)));
    }
    longest
}

/// When the last attempt of a client ended.
fn last_end(operations: &[Operation]) -> Option<Duration> {
    operations.iter().filter(|operation| operation.client != READER).map(|operation| operation.completed).max()
}

/// The operations of one key around one of them, and what was done to the cluster about that time.
pub fn surroundings(operations: &[Operation], wrong: usize, events: &[Event]) -> String {
    let first = wrong.saturating_sub(SHOWN_OPERATIONS);
    let end = (wrong + SHOWN_OPERATIONS).min(operations.len());
    let mut lines = Vec::new();
    for (number, operation) in operations.iter().enumerate().take(end).skip(first) {
        let mark = if number == wrong { ">>" } else { "  " };
        lines.push((operation.completed, format!("{mark} {operation}")));
    }
    let (from, to) = (operations[first].invoked, operations[end - 1].completed);
    let before = events.iter().rev().find(|event| event.at < from);
    let within = events.iter().filter(|event| event.at >= from && event.at <= to);
    for event in before.into_iter().chain(within) {
        lines.push((event.at, format!("   {:10.4} s  *** {}", event.at.as_secs_f64(), event.what)));
    }
    lines.sort_by_key(|(at, _)| *at);
    lines.into_iter().map(|(_, line)| line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(client: u32, invoked: u64, completed: u64, action: Action, outcome: Outcome) -> Operation {
        let (invoked, completed) = (Duration::from_millis(invoked), Duration::from_millis(completed));
        Operation { key: "k".into(), client, action, invoked, completed, outcome }
    }

    fn done(number: i64) -> Outcome {
        Outcome::Done(Answer::Number(number))
    }

    #[test]
    fn errors_tell_what_is_known() {
        for (text, expected) in [
            ("UNKNOWN the connection to the store was lost", Some(Outcome::Unknown)),
            ("CLUSTERDOWN the shard cannot be reached; nothing was executed", Some(Outcome::NotExecuted)),
            ("NOREPLICAS Not enough good replicas to write.", Some(Outcome::NotExecuted)),
            ("MISCONF Errors writing to shard 0/0", Some(Outcome::NotExecuted)),
            ("ERR value is not an integer or out of range", None),
        ] {
            let reply = Value::Error(text.as_bytes().to_vec());
            assert_eq!(outcome_of(&Action::Increment, &reply).ok(), expected, "{text}");
        }
        assert!(outcome_of(&Action::Get, &Value::Integer(1)).is_err());
    }

    #[test]
    fn counters_are_bounded_by_what_was_acknowledged() {
        let counted = |value: &str| {
            let mut history = History::default();
            history.add(operation(1, 0, 1, Action::Increment, done(1)));
            history.add(operation(1, 2, 3, Action::Increment, Outcome::Unknown));
            history.add(operation(1, 4, 5, Action::Increment, Outcome::NotExecuted));
            let found = Outcome::Done(Answer::Found(Some(value.as_bytes().to_vec())));
            history.add(operation(READER, 6, 7, Action::Get, found));
            history.check_counters()
        };
        assert!(counted("1").is_empty() && counted("2").is_empty());
        assert_eq!(counted("0").len(), 1);
        assert_eq!(counted("3"), ["k counts 3: 1 acknowledged, 1 unknown"]);
    }

    #[test]
    fn a_key_is_unavailable_while_someone_waits_for_it() {
        let mut history = History::default();
        history.add(operation(1, 0, 10, Action::Increment, done(1)));
        // Nobody asked for 90 ms, then one had to wait for 300 and the next for 200 until it went on.
        history.add(operation(1, 100, 400, Action::Increment, Outcome::NotExecuted));
        history.add(operation(1, 410, 600, Action::Increment, done(2)));
        history.add(operation(1, 610, 620, Action::Increment, done(3)));
        let milliseconds =
            |from, to| history.unavailable(Duration::from_millis(from), Duration::from_millis(to)).as_millis();
        assert_eq!(milliseconds(0, 1000), 500);
        assert_eq!(milliseconds(0, 90), 10);
        assert_eq!(milliseconds(300, 500), 300);
        assert_eq!(milliseconds(0, 200), 500);
        assert_eq!(milliseconds(605, 1000), 10);
    }

    #[test]
    fn quantiles_are_of_what_was_answered_in_the_time() {
        let mut history = History::default();
        for number in 0..100 {
            history.add(operation(1, 0, number, Action::Increment, done(1)));
        }
        history.add(operation(1, 0, 50, Action::Increment, Outcome::Unknown));
        let milliseconds = |from, to, share| {
            history.quantile(Duration::from_millis(from), Duration::from_millis(to), share).as_millis()
        };
        assert_eq!(milliseconds(0, 1000, 0.99), 99);
        assert_eq!(milliseconds(0, 50, 0.5), 25);
        assert_eq!(milliseconds(200, 300, 0.5), 0);
    }

    #[test]
    fn a_key_that_nobody_asks_for_any_more_is_unavailable_to_the_end_of_the_last_attempt() {
        let mut history = History::default();
        history.add(operation(1, 0, 10, Action::Increment, done(1)));
        history.add(operation(1, 100, 2100, Action::Increment, Outcome::Unknown));
        history.add(operation(2, 150, 5150, Action::Increment, Outcome::Unknown));
        let milliseconds =
            |from, to| history.unavailable(Duration::from_millis(from), Duration::from_millis(to)).as_millis();
        assert_eq!(milliseconds(0, 60_000), 5050);
        assert_eq!(milliseconds(0, 90), 10);
    }
}
