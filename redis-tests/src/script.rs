//! Tests as data: what is typed and what redis-cli would show, run against redis-server and against Vasto alike.
//!
//! ```text
//! # A comment.
//! == a case begins: the keyspace is empty and the connections are new
//! > SET a "1 2"
//! < OK
//! 2> GET a
//! < "1 2"
//! ```
//!
//! | line | means |
//! |---|---|
//! | `> COMMAND` | is sent and answered; `2>` on a second connection |
//! | `~> COMMAND` | is sent again and again until the answer is the expected one |
//! | `< TEXT` | one line of the answer, exactly; `(none)`: no answer comes; `(closed)`: the connection ends |
//! | `<~ TEXT` | one line, with `*` for any text |
//! | `<# 99..100` | an integer from a range |
//! | `<% TEXT` | one element of an array whose order does not matter |
//! | `<...` | any lines, to the end of the answer |
//! | `= NAME` | keeps the text of the answer as `${NAME}` |
//!
//! `${now+10}` and `${now_ms-10}` are the time, `${repeat x 1000}` is a long text. Under a case's title may stand
//! `@resp3`, `@vasto-only REASON`, `@one-shard REASON` and `@many-shards REASON`, which say how and where it runs.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::connection::{Address, Connection};
use crate::eventually::{PATIENCE, eventually_within};
use crate::notation;
use crate::resp::{self, Value};

/// So long must nothing come where no reply is expected.
const SILENCE: Duration = Duration::from_millis(50);

/// What a script is run against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Redis,
    OneShard,
    ManyShards,
}

/// Where a case makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    Everywhere,
    VastoOnly,
    OneShard,
    ManyShards,
}

/// A file of cases.
pub struct Script {
    name: String,
    cases: Vec<Case>,
}

struct Case {
    title: String,
    scope: Scope,
    resp3: bool,
    steps: Vec<Step>,
}

struct Step {
    line_number: usize,
    connection: u8,
    patience: Patience,
    command: String,
    expected: Vec<Expected>,
    variable: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Patience {
    AtOnce,
    Eventually,
}

enum Expected {
    Line(String),
    Glob(String),
    Range(i64, i64),
    Element(String),
    Rest,
}

/// What came back.
enum Outcome {
    Reply(Value),
    Closed,
    Silence,
}

impl Script {
    /// Reads a file; panics where it is no script.
    pub fn read(path: &Path) -> Script {
        let text =
            std::fs::read_to_string(path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
        let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        Script::parse(&name, &text)
    }

    pub fn parse(name: &str, text: &str) -> Script {
        let mut cases: Vec<Case> = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let at = || format!("{name}:{}: {line}", index + 1);
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(title) = line.strip_prefix("== ") {
                cases.push(Case { title: title.to_owned(), scope: Scope::Everywhere, resp3: false, steps: Vec::new() });
                continue;
            }
            let case = cases.last_mut().unwrap_or_else(|| panic!("before the first case: {}", at()));
            if let Some(mark) = line.strip_prefix('@') {
                let (mark, reason) = mark.split_once(' ').unwrap_or((mark, ""));
                match mark {
                    "resp3" => case.resp3 = true,
                    "vasto-only" | "one-shard" | "many-shards" => {
                        assert!(!reason.is_empty(), "a reason is missing: {}", at());
                        case.scope = match mark {
                            "vasto-only" => Scope::VastoOnly,
                            "one-shard" => Scope::OneShard,
                            _ => Scope::ManyShards,
                        };
                    }
                    _ => panic!("no such mark: {}", at()),
                }
                continue;
            }
            if let Some(step) = parse_command(line, index + 1) {
                case.steps.push(step);
                continue;
            }
            let step = case.steps.last_mut().unwrap_or_else(|| panic!("before the first command: {}", at()));
            if let Some(variable) = line.strip_prefix("= ") {
                step.variable = Some(variable.trim().to_owned());
            } else {
                step.expected.push(parse_expected(line).unwrap_or_else(|| panic!("not understood: {}", at())));
            }
        }
        Script { name: name.to_owned(), cases }
    }

    /// Runs every case that makes sense there; the text of each failure.
    pub fn failures(&self, address: &Address, target: Target) -> Vec<String> {
        self.cases
            .iter()
            .filter(|case| case.runs_on(target))
            .filter_map(|case| {
                run_case(case, address)
                    .err()
                    .map(|reason| format!("{}: == {} on {target:?}: {reason}", self.name, case.title))
            })
            .collect()
    }

    /// Every command of the script, in capitals.
    pub fn commands(&self) -> impl Iterator<Item = String> + '_ {
        self.cases.iter().flat_map(|case| &case.steps).filter_map(|step| {
            let name = step.command.split_whitespace().next()?;
            Some(name.trim_matches('"').to_ascii_uppercase())
        })
    }
}

impl Case {
    fn runs_on(&self, target: Target) -> bool {
        match self.scope {
            Scope::Everywhere => true,
            Scope::VastoOnly => target != Target::Redis,
            Scope::OneShard => target != Target::ManyShards,
            Scope::ManyShards => target == Target::ManyShards,
        }
    }
}

fn parse_command(line: &str, line_number: usize) -> Option<Step> {
    let (digit, rest) = match line.as_bytes().first()? {
        digit @ b'1'..=b'9' => (digit - b'0', &line[1..]),
        _ => (1, line),
    };
    let (patience, command) = match rest.strip_prefix("~> ") {
        Some(command) => (Patience::Eventually, command),
        None => (Patience::AtOnce, rest.strip_prefix("> ")?),
    };
    Some(Step {
        line_number,
        connection: digit,
        patience,
        command: command.to_owned(),
        expected: Vec::new(),
        variable: None,
    })
}

fn parse_expected(line: &str) -> Option<Expected> {
    if line.starts_with("<...") {
        return Some(Expected::Rest);
    }
    let (mark, text) = line.split_once(' ').unwrap_or((line, ""));
    match mark {
        "<" => Some(Expected::Line(text.to_owned())),
        "<~" => Some(Expected::Glob(text.to_owned())),
        "<%" => Some(Expected::Element(text.to_owned())),
        "<#" => {
            let (low, high) = text.split_once("..")?;
            Some(Expected::Range(low.trim().parse().ok()?, high.trim().parse().ok()?))
        }
        _ => None,
    }
}

fn run_case(case: &Case, address: &Address) -> Result<(), String> {
    let clean = Connection::try_open(address).and_then(|mut connection| connection.try_call(&["FLUSHALL"]));
    match clean {
        Ok(value) if value == Value::ok() => {}
        Ok(value) => return Err(format!("FLUSHALL: {}", value.text())),
        Err(error) => return Err(format!("FLUSHALL: {error}")),
    }
    let mut connections: BTreeMap<u8, Connection> = BTreeMap::new();
    let mut variables: BTreeMap<String, String> = BTreeMap::new();
    for step in &case.steps {
        let connection = connection_of(&mut connections, step, address, case)?;
        run_step(step, connection, &mut variables)
            .map_err(|reason| format!("line {}: {}\n{reason}", step.line_number, step.command))?;
    }
    Ok(())
}

/// The connection of a step, opened when it is first named.
fn connection_of<'a>(
    connections: &'a mut BTreeMap<u8, Connection>,
    step: &Step,
    address: &Address,
    case: &Case,
) -> Result<&'a mut Connection, String> {
    match connections.entry(step.connection) {
        Entry::Occupied(entry) => Ok(entry.into_mut()),
        Entry::Vacant(entry) => {
            let connection = open(address, case.resp3).map_err(|error| error.to_string())?;
            Ok(entry.insert(connection))
        }
    }
}

fn open(address: &Address, resp3: bool) -> io::Result<Connection> {
    let mut connection = Connection::try_open(address)?;
    if resp3 {
        let reply = connection.try_call(&["HELLO", "3"])?;
        if reply.is_error() {
            return Err(io::Error::other(format!("HELLO 3: {}", reply.text())));
        }
    }
    Ok(connection)
}

fn run_step(step: &Step, connection: &mut Connection, variables: &mut BTreeMap<String, String>) -> Result<(), String> {
    let mut attempt = || -> Result<(), String> {
        let line = substitute(&step.command, variables)?;
        let arguments = notation::split(&line).ok_or("unbalanced quotes")?;
        let mut expected: &[Expected] = &step.expected;
        if expected.is_empty() {
            return Err("no answer is expected: write one, or `< (none)`".to_owned());
        }
        // `(closed)` may follow a last reply.
        let mut closes = false;
        if let Some((Expected::Line(last), rest)) = expected.split_last()
            && last == "(closed)"
        {
            closes = true;
            expected = rest;
        }
        let silent = matches!(expected, [Expected::Line(line)] if line == "(none)");
        if closes && expected.is_empty() {
            // The end is the only answer.
            expected = &step.expected;
            closes = false;
        }
        let outcome = exchange(connection, &arguments, silent).map_err(|error| error.to_string())?;
        check(&outcome, expected, variables)?;
        if let (Some(variable), Outcome::Reply(value)) = (&step.variable, &outcome) {
            let text = match value {
                Value::Integer(number) => number.to_string(),
                other => other.text(),
            };
            variables.insert(variable.clone(), text);
        }
        if closes {
            let (bytes, closed) = connection.read_until_quiet(Duration::from_secs(10));
            if !bytes.is_empty() || !closed {
                return Err(format!("expected the connection to be closed, came: '{}'", bytes.escape_ascii()));
            }
        }
        Ok(())
    };
    match step.patience {
        Patience::AtOnce => attempt(),
        Patience::Eventually => {
            // Its message goes to whoever reads the failure of this case.
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                eventually_within(PATIENCE, &step.command, attempt);
            }))
            .map_err(|panic| match panic.downcast::<String>() {
                Ok(message) => *message,
                Err(_) => "the wait failed".to_owned(),
            })
        }
    }
}

/// Sends a command and takes what comes; a connection that the server has closed is an outcome, not an error.
fn exchange(connection: &mut Connection, arguments: &[Vec<u8>], silent: bool) -> io::Result<Outcome> {
    match connection.send(&resp::command(arguments)) {
        Ok(()) => {}
        Err(error) if is_closed(&error) => return Ok(Outcome::Closed),
        Err(error) => return Err(error),
    }
    if silent {
        let (bytes, closed) = connection.read_until_quiet(SILENCE);
        if closed {
            return Ok(Outcome::Closed);
        }
        if bytes.is_empty() {
            return Ok(Outcome::Silence);
        }
        return resp::parse(&bytes).map(Outcome::Reply);
    }
    match connection.read_value() {
        Ok(value) => Ok(Outcome::Reply(value)),
        Err(error) if is_closed(&error) => Ok(Outcome::Closed),
        Err(error) => Err(error),
    }
}

fn is_closed(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

fn check(outcome: &Outcome, expected: &[Expected], variables: &BTreeMap<String, String>) -> Result<(), String> {
    let shown = match outcome {
        Outcome::Reply(value) => notation::format(value),
        Outcome::Closed => "(closed)".to_owned(),
        Outcome::Silence => "(none)".to_owned(),
    };
    let matches = if expected.iter().any(|line| matches!(line, Expected::Element(_))) {
        let elements = match outcome {
            Outcome::Reply(value) => value.elements(),
            Outcome::Closed | Outcome::Silence => None,
        };
        elements.is_some_and(|elements| same_elements(&elements, expected))
    } else {
        same_lines(&shown, expected, variables)?
    };
    if matches {
        return Ok(());
    }
    let wanted: Vec<String> = expected.iter().map(Expected::to_line).collect();
    Err(format!("expected:\n{}\ncame:\n{}", wanted.join("\n"), indent(&shown)))
}

fn same_elements(elements: &[Value], expected: &[Expected]) -> bool {
    let mut came: Vec<String> = elements.iter().map(notation::format).collect();
    let mut wanted: Vec<String> = expected
        .iter()
        .filter_map(|line| match line {
            Expected::Element(text) => Some(text.clone()),
            _ => None,
        })
        .collect();
    came.sort();
    wanted.sort();
    came == wanted
}

fn same_lines(shown: &str, expected: &[Expected], variables: &BTreeMap<String, String>) -> Result<bool, String> {
    let mut lines = shown.split('\n');
    for expectation in expected {
        if matches!(expectation, Expected::Rest) {
            return Ok(true);
        }
        let Some(line) = lines.next() else {
            return Ok(false);
        };
        let fits = match expectation {
            Expected::Line(text) => substitute(text, variables)? == line,
            Expected::Glob(pattern) => glob(substitute(pattern, variables)?.as_bytes(), line.as_bytes()),
            Expected::Range(low, high) => line
                .strip_prefix("(integer) ")
                .and_then(|number| number.parse::<i64>().ok())
                .is_some_and(|number| (*low..=*high).contains(&number)),
            Expected::Element(_) | Expected::Rest => false,
        };
        if !fits {
            return Ok(false);
        }
    }
    Ok(lines.next().is_none())
}

impl Expected {
    fn to_line(&self) -> String {
        match self {
            Expected::Line(text) => format!("< {text}"),
            Expected::Glob(text) => format!("<~ {text}"),
            Expected::Range(low, high) => format!("<# {low}..{high}"),
            Expected::Element(text) => format!("<% {text}"),
            Expected::Rest => "<...".to_owned(),
        }
    }
}

fn indent(text: &str) -> String {
    let lines: Vec<String> = text.lines().map(|line| format!("< {line}")).collect();
    lines.join("\n")
}

/// Whether the text fits the pattern, in which `*` stands for any text.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let mut parts = pattern.split(|byte| *byte == b'*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    let mut parts: Vec<&[u8]> = parts.collect();
    let Some(last) = parts.pop() else {
        return rest.is_empty();
    };
    for part in parts {
        if part.is_empty() {
            continue;
        }
        match rest.windows(part.len()).position(|window| window == part) {
            Some(position) => rest = &rest[position + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

/// Replaces every `${...}`.
fn substitute(text: &str, variables: &BTreeMap<String, String>) -> Result<String, String> {
    let mut result = String::new();
    let mut rest = text;
    while let Some(start) = rest.find("${") {
        let length = rest[start..].find('}').ok_or("no } after ${")?;
        result.push_str(&rest[..start]);
        result.push_str(&value_of(&rest[start + 2..start + length], variables)?);
        rest = &rest[start + length + 1..];
    }
    result.push_str(rest);
    Ok(result)
}

fn value_of(expression: &str, variables: &BTreeMap<String, String>) -> Result<String, String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    for (name, time) in [("now_ms", now.as_millis()), ("now", u128::from(now.as_secs()))] {
        if let Some(offset) = expression.strip_prefix(name) {
            let offset: i64 = if offset.is_empty() {
                0
            } else {
                offset.parse().map_err(|_| format!("not an offset: ${{{expression}}}"))?
            };
            return Ok((time as i64 + offset).to_string());
        }
    }
    if let Some(repeat) = expression.strip_prefix("repeat ") {
        let (text, count) = repeat.split_once(' ').ok_or("${repeat TEXT COUNT}")?;
        let count: usize = count.parse().map_err(|_| "${repeat TEXT COUNT}")?;
        return Ok(text.repeat(count));
    }
    variables.get(expression).cloned().ok_or_else(|| format!("no variable ${{{expression}}}"))
}

/// Writes the answers of the server into the script where none are written yet, for a person to read and keep.
pub fn record(text: &str, address: &Address) -> Result<String, String> {
    let script = Script::parse("recorded", text);
    let mut answers: BTreeMap<usize, String> = BTreeMap::new();
    for case in &script.cases {
        if case.scope == Scope::VastoOnly || case.scope == Scope::ManyShards {
            continue;
        }
        let flush = Connection::try_open(address).and_then(|mut connection| connection.try_call(&["FLUSHALL"]));
        flush.map_err(|error| error.to_string())?;
        let mut connections: BTreeMap<u8, Connection> = BTreeMap::new();
        let mut variables: BTreeMap<String, String> = BTreeMap::new();
        for step in &case.steps {
            let connection = connection_of(&mut connections, step, address, case)?;
            let at = |error: String| format!("line {}: {}: {error}", step.line_number, step.command);
            if step.expected.is_empty() {
                let line = substitute(&step.command, &variables).map_err(at)?;
                let arguments = notation::split(&line).ok_or_else(|| at("unbalanced quotes".to_owned()))?;
                let outcome = exchange(connection, &arguments, false).map_err(|error| at(error.to_string()))?;
                let answer = match outcome {
                    Outcome::Reply(value) => notation::format(&value),
                    Outcome::Closed => "(closed)".to_owned(),
                    Outcome::Silence => "(none)".to_owned(),
                };
                answers.insert(step.line_number, indent(&answer));
            } else {
                run_step(step, connection, &mut variables).map_err(at)?;
            }
        }
    }
    let mut result = String::new();
    for (index, line) in text.lines().enumerate() {
        result.push_str(line);
        result.push('\n');
        if let Some(answer) = answers.get(&(index + 1)) {
            result.push_str(answer);
            result.push('\n');
        }
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_match_whole_lines() {
        for (pattern, text, fits) in [
            ("a*c", "abc", true),
            ("a*c", "abd", false),
            ("abc", "abc", true),
            ("abc", "abcd", false),
            ("*", "", true),
            ("a*b*c", "aXbXbXc", true),
            ("a*b*c", "acb", false),
            ("ab*ba", "aba", false),
        ] {
            assert_eq!(glob(pattern.as_bytes(), text.as_bytes()), fits, "{pattern} {text}");
        }
    }

    #[test]
    fn a_script_proves_itself_against_redis_server() {
        let redis = crate::RedisServer::start();
        let script = Script::parse(
            "self",
            r#"
== everything of the notation
> SET a "1 2"
< OK
2> GET a
< "1 2"
~> GET b
< (nil)
> CLIENT ID
<~ (integer) *
= id
> ECHO ${id}
< "${id}"
> EXPIREAT a ${now+100}
< (integer) 1
> TTL a
<# 99..100
> MSET b 2 c 3
< OK
> KEYS *
<% "a"
<% "c"
<% "b"
> STRLEN ${repeat xy 5}
< (integer) 0
> INFO
<...
> CLIENT REPLY SKIP
< (none)
> PING
< (none)
== two answers and maps
@resp3
> CONFIG GET maxmemory
< 1# "maxmemory" => "0"
> QUIT
< OK
< (closed)
"#,
        );
        assert_eq!(script.failures(&redis.address(), Target::Redis), Vec::<String>::new());
    }

    #[test]
    fn a_wrong_answer_is_shown_with_its_line() {
        let redis = crate::RedisServer::start();
        let script = Script::parse("wrong", "== title\n> ECHO a\n< \"b\"\n");
        let failures = script.failures(&redis.address(), Target::Redis);
        assert_eq!(failures.len(), 1);
        assert!(failures[0].contains("line 2: ECHO a\nexpected:\n< \"b\"\ncame:\n< \"a\""), "{failures:?}");
    }
}
