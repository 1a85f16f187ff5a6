//! Hostile and broken input: exact bytes in, exact bytes out, closed or not. What redis-server does is what is expected.

use std::time::{Duration, Instant};

use redis_tests::{Address, Connection, RedisServer, Server, Value, eventually};

/// What becomes of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// It answers the next command.
    Serves,
    /// It waits for the rest of a request.
    Waits,
    Closed,
}

struct Case {
    name: &'static str,
    sent: Vec<u8>,
    delivery: Delivery,
    answer: Vec<u8>,
    then: Then,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Delivery {
    OnePacket,
    ByteByByte,
}

fn case(name: &'static str, sent: impl AsRef<[u8]>, answer: impl AsRef<[u8]>, then: Then) -> Case {
    Case { name, sent: sent.as_ref().to_vec(), delivery: Delivery::OnePacket, answer: answer.as_ref().to_vec(), then }
}

fn byte_by_byte(name: &'static str, sent: impl AsRef<[u8]>, answer: impl AsRef<[u8]>, then: Then) -> Case {
    Case { delivery: Delivery::ByteByByte, ..case(name, sent, answer, then) }
}

fn protocol_error(text: &str) -> Vec<u8> {
    format!("-ERR Protocol error: {text}\r\n").into_bytes()
}

fn cases() -> Vec<Case> {
    use Then::{Closed, Serves, Waits};
    let invalid_multibulk = protocol_error("invalid multibulk length");
    let invalid_bulk = protocol_error("invalid bulk length");
    let unbalanced = protocol_error("unbalanced quotes in request");
    let long = "x".repeat(100_000);
    vec![
        // Lines.
        case("a line", "PING\r\n", "+PONG\r\n", Serves),
        case("a line that ends with LF alone", "PING\n", "+PONG\r\n", Serves),
        case("empty lines are skipped", "\r\n\r\n\n\r\nPING\r\n", "+PONG\r\n", Serves),
        case("a line of blanks is skipped", "    \r\nPING\r\n", "+PONG\r\n", Serves),
        case("blanks around words", "  PING \t hello  \r\n", "$5\r\nhello\r\n", Serves),
        case("quoted words", "ECHO \"a b\"\r\n", "$3\r\na b\r\n", Serves),
        case("escapes", "ECHO \"\\x00\\xff\\n\\\"\"\r\n", b"$4\r\n\x00\xff\n\"\r\n", Serves),
        case("single quotes", "ECHO 'it\\'s \\n'\r\n", "$7\r\nit's \\n\r\n", Serves),
        case("an empty word", "ECHO \"\"\r\n", "$0\r\n\r\n", Serves),
        case("an open double quote", "ECHO \"a\r\n", &unbalanced, Closed),
        case("an open single quote", "ECHO 'a\r\n", &unbalanced, Closed),
        case("a quote that ends inside of a word", "ECHO \"a\"b\r\n", &unbalanced, Closed),
        case("a single quote that ends inside of a word", "ECHO 'a'b\r\n", &unbalanced, Closed),
        case("nothing is answered after an error", "ECHO 'a\r\nPING\r\n", &unbalanced, Closed),
        case("a line without end", "x".repeat(65 * 1024 + 1), protocol_error("too big inline request"), Closed),
        case("a line just below the limit waits", "x".repeat(60 * 1024), "", Waits),
        case(
            "a line of no text",
            b"\xff\xf4\xff\xfd\x06\r\n",
            b"-ERR unknown command '\xff\xf4\xff\xfd\x06', with args beginning with: \r\n",
            Serves,
        ),
        // Arrays.
        case("an array", "*1\r\n$4\r\nPING\r\n", "+PONG\r\n", Serves),
        case("no array", "*-1\r\n*1\r\n$4\r\nPING\r\n", "+PONG\r\n", Serves),
        case("less than no array", "*-2\r\nPING\r\n", "+PONG\r\n", Serves),
        case("an empty array", "*0\r\nPING\r\n", "+PONG\r\n", Serves),
        case(
            "arrays and lines in turn",
            "*1\r\n$4\r\nPING\r\nPING\r\n*0\r\n\r\nPING\r\n",
            "+PONG\r\n+PONG\r\n+PONG\r\n",
            Serves,
        ),
        case("an array of letters", "*x\r\n", &invalid_multibulk, Closed),
        case("an array of nothing", "*\r\n", &invalid_multibulk, Closed),
        case("an array with a blank", "* 1\r\n", &invalid_multibulk, Closed),
        case("an array with a sign", "*+1\r\n", &invalid_multibulk, Closed),
        case("an array with letters after", "*1x\r\n", &invalid_multibulk, Closed),
        case("an array with zeros in front", "*01\r\n", &invalid_multibulk, Closed),
        case("an array of a fraction", "*1.0\r\n", &invalid_multibulk, Closed),
        case("an array of 2^31", "*2147483648\r\n", &invalid_multibulk, Closed),
        case("an array of more than 2^64", "*99999999999999999999\r\n", &invalid_multibulk, Closed),
        case("an array header that ends with LF alone", "*1\n$4\r\nPING\r\n", &invalid_multibulk, Closed),
        case(
            "an array header without end",
            format!("*{}", "1".repeat(70_000)),
            protocol_error("too big mbulk count string"),
            Closed,
        ),
        case("an array of a million promises", "*1000000\r\n", "", Waits),
        case("a bulk string of the longest length", "*1\r\n$536870912\r\n", "", Waits),
        // Bulk strings.
        case("no bulk string", "*1\r\nPING\r\n", protocol_error("expected '$', got 'P'"), Closed),
        case("an integer", "*1\r\n:1\r\n", protocol_error("expected '$', got ':'"), Closed),
        case("an array in an array", "*1\r\n*1\r\n", protocol_error("expected '$', got '*'"), Closed),
        case("an empty line in an array", "*1\r\n\r\n", protocol_error("expected '$', got ' '"), Closed),
        case("letters for a length", "*1\r\n$x\r\n", &invalid_bulk, Closed),
        case("no length", "*1\r\n$\r\n", &invalid_bulk, Closed),
        case("a length with a blank", "*1\r\n$ 4\r\n", &invalid_bulk, Closed),
        case("a length with zeros in front", "*1\r\n$04\r\nPING\r\n", &invalid_bulk, Closed),
        case("a negative length", "*1\r\n$-1\r\n", &invalid_bulk, Closed),
        case("a very negative length", "*1\r\n$-9223372036854775808\r\n", &invalid_bulk, Closed),
        case("a length over the limit", "*1\r\n$536870913\r\n", &invalid_bulk, Closed),
        case("a length of more than 2^64", "*1\r\n$99999999999999999999\r\n", &invalid_bulk, Closed),
        case("an error in the second bulk string", "*2\r\n$4\r\nECHO\r\n$-5\r\n", &invalid_bulk, Closed),
        case(
            "a length without end",
            format!("*1\r\n${}", "1".repeat(70_000)),
            protocol_error("too big bulk count string"),
            Closed,
        ),
        case(
            "what stands in place of CR LF is skipped",
            "*1\r\n$4\r\nPINGxy*1\r\n$4\r\nPING\r\n",
            "+PONG\r\n+PONG\r\n",
            Serves,
        ),
        case("CR LF within a bulk string", "*2\r\n$4\r\nECHO\r\n$4\r\n\r\n\r\n\r\n", "$4\r\n\r\n\r\n\r\n", Serves),
        case("an empty bulk string", "*2\r\n$4\r\nECHO\r\n$0\r\n\r\n", "$0\r\n\r\n", Serves),
        case(
            "answers before the error arrive",
            "PING\r\nECHO a\r\n*x\r\nPING\r\n",
            "+PONG\r\n$1\r\na\r\n-ERR Protocol error: invalid multibulk length\r\n",
            Closed,
        ),
        // Browsers that were told to talk to us.
        case("POST as a line", "POST / HTTP/1.1\r\nPING\r\n", "", Closed),
        case("post as a line", "post / HTTP/1.1\r\n", "", Closed),
        case("Host: as a line", "Host: localhost\r\nPING\r\n", "", Closed),
        case("POST as an array", "*1\r\n$4\r\nPOST\r\n", "", Closed),
        case("host: as an array", "*2\r\n$5\r\nhost:\r\n$1\r\nx\r\n", "", Closed),
        // Requests that are not whole.
        case("half an array header", "*", "", Waits),
        case("an array header without LF", "*1\r", "", Waits),
        case("half a length", "*1\r\n$", "", Waits),
        case("half a bulk string", "*2\r\n$4\r\nECHO\r\n$5\r\nhel", "", Waits),
        case("a bulk string without CR LF", "*2\r\n$4\r\nECHO\r\n$5\r\nhello", "", Waits),
        case("a whole and a half command", "PING\r\n*1\r\n$4\r\nPI", "+PONG\r\n", Waits),
        case("half a line", "PIN", "", Waits),
        byte_by_byte(
            "a command byte by byte",
            "*2\r\n$4\r\nECHO\r\n$7\r\nhe\r\nllo\r\n\r\nPING x\r\n",
            "$7\r\nhe\r\nllo\r\n$1\r\nx\r\n",
            Serves,
        ),
        byte_by_byte("an error byte by byte", "*1\r\n$-1\r\n", &invalid_bulk, Closed),
        case("many commands in one packet", "PING\r\n".repeat(5_000), "+PONG\r\n".repeat(5_000), Serves),
        case(
            "many arrays in one packet",
            "*2\r\n$4\r\nECHO\r\n$2\r\nab\r\n".repeat(3_000),
            "$2\r\nab\r\n".repeat(3_000),
            Serves,
        ),
        case("nothing is answered after QUIT", "PING\r\nQUIT\r\nPING\r\n", "+PONG\r\n+OK\r\n", Closed),
        // Texts of errors.
        case(
            "CR LF in the name of a command",
            "*1\r\n$5\r\nFO\r\nO\r\n",
            "-ERR unknown command 'FO  O', with args beginning with: \r\n",
            Serves,
        ),
        case(
            "CR LF in an argument",
            "*2\r\n$3\r\nFOO\r\n$3\r\n\r\na\r\n",
            "-ERR unknown command 'FOO', with args beginning with: '  a' \r\n",
            Serves,
        ),
        case(
            "a very long name",
            format!("*1\r\n$100000\r\n{long}\r\n"),
            format!("-ERR unknown command '{}', with args beginning with: \r\n", "x".repeat(128)),
            Serves,
        ),
        case(
            "a very long argument",
            format!("*2\r\n$3\r\nFOO\r\n$100000\r\n{long}\r\n"),
            format!("-ERR unknown command 'FOO', with args beginning with: '{}' \r\n", "x".repeat(128)),
            Serves,
        ),
        case(
            "a very long subcommand",
            format!("*2\r\n$6\r\nCLIENT\r\n$100000\r\n{long}\r\n"),
            format!("-ERR unknown subcommand '{}'. Try CLIENT HELP.\r\n", "x".repeat(128)),
            Serves,
        ),
        case(
            "many arguments",
            format!("*10001\r\n$3\r\nFOO\r\n{}", "$1\r\na\r\n".repeat(10_000)),
            format!("-ERR unknown command 'FOO', with args beginning with: {}\r\n", "'a' ".repeat(32)),
            Serves,
        ),
        case("an empty name", "*1\r\n$0\r\n\r\n", "-ERR unknown command '', with args beginning with: \r\n", Serves),
    ]
}

/// Long enough for a busy machine; nobody waits so long unless something is wrong.
const PATIENCE: Duration = Duration::from_secs(20);

/// So long must nothing come where nothing is expected.
const SILENCE: Duration = Duration::from_millis(60);

fn run(case: &Case, address: &Address) -> Result<(), String> {
    let mut connection = Connection::open(address);
    match case.delivery {
        // The server may close before all is sent.
        Delivery::OnePacket => drop(connection.send(&case.sent)),
        Delivery::ByteByByte => {
            for byte in &case.sent {
                if connection.send(&[*byte]).is_err() {
                    break;
                }
                // Apart on the wire, as far as that can be asked for.
                redis_tests::eventually::pause(Duration::from_millis(2));
            }
        }
    }
    let mut answer = Vec::new();
    let mut closed = false;
    let start = Instant::now();
    let goal = case.answer.len();
    while !closed && start.elapsed() < PATIENCE && (answer.len() < goal || case.then == Then::Closed) {
        let (bytes, end) = connection.read_until_quiet(SILENCE);
        answer.extend_from_slice(&bytes);
        closed = end;
    }
    if case.then == Then::Serves && !closed {
        let marker = b"*2\r\n$4\r\nECHO\r\n$6\r\nmarker\r\n";
        connection.send(marker).map_err(|error| format!("it was closed: {error}"))?;
        let start = Instant::now();
        while !closed && !answer.ends_with(b"$6\r\nmarker\r\n") && start.elapsed() < PATIENCE {
            let (bytes, end) = connection.read_until_quiet(SILENCE);
            answer.extend_from_slice(&bytes);
            closed = end;
        }
        let rest = answer
            .strip_suffix(b"$6\r\nmarker\r\n")
            .ok_or_else(|| format!("it does not serve any more; came '{}'", shortened(&answer)))?
            .to_vec();
        answer = rest;
    }
    if case.then == Then::Waits {
        let (bytes, end) = connection.read_until_quiet(SILENCE);
        answer.extend_from_slice(&bytes);
        closed |= end;
    }
    if answer != case.answer {
        return Err(format!("expected '{}', came '{}'", shortened(&case.answer), shortened(&answer)));
    }
    match (case.then, closed) {
        (Then::Closed, false) => Err("it was not closed".to_owned()),
        (Then::Serves | Then::Waits, true) => Err("it was closed".to_owned()),
        (Then::Closed, true) | (Then::Serves | Then::Waits, false) => Ok(()),
    }
}

fn shortened(bytes: &[u8]) -> String {
    let text = bytes.escape_ascii().to_string();
    if text.len() > 300 { format!("{}...({} bytes)", &text[..300], bytes.len()) } else { text }
}

fn check(address: &Address) {
    let failures: Vec<String> = cases()
        .iter()
        .filter_map(|case| {
            run(case, address).err().map(|reason| format!("{}: sent '{}': {reason}", case.name, shortened(&case.sent)))
        })
        .collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn redis_server_answers_as_expected() {
    check(&RedisServer::start().address());
}

#[test]
fn hostile_input_is_answered_as_redis_server_does() {
    check(&Server::start().address());
}

#[test]
fn hostile_input_over_a_unix_socket_is_answered_alike() {
    let folder = redis_tests::cluster::temporary_directory();
    let socket = folder.path().join("vasto.sock");
    let path = socket.to_str().unwrap();
    let _server = Server::start_with(&["--unixsocket", path]);
    check(&Address::Unix(socket));
}

/// redis-server drops what it had answered before; whether that arrives does not matter to a browser.
fn a_browser_is_turned_away(mut connection: Connection) {
    let request = b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n";
    connection.send(request).unwrap();
    assert!(connection.is_closed_within(PATIENCE));
}

#[test]
fn browsers_are_turned_away() {
    a_browser_is_turned_away(RedisServer::start().connect());
    a_browser_is_turned_away(Server::start().connect());
}

fn limit_on_bulk_strings(mut connection: Connection) {
    connection.done(&["CONFIG", "SET", "proto-max-bulk-len", "1048576"]);
    let largest = vec![b'x'; 1_048_576];
    assert_eq!(connection.call(&[&b"SET"[..], b"k", &largest]), Value::ok());
    connection.send(b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$1048577\r\n").unwrap();
    assert_eq!(connection.read_raw().unwrap(), b"-ERR Protocol error: invalid bulk length\r\n");
    assert!(connection.is_closed_within(PATIENCE));
}

#[test]
fn a_lower_limit_on_bulk_strings_holds() {
    limit_on_bulk_strings(RedisServer::start().connect());
    limit_on_bulk_strings(Server::start().connect());
}

/// Promises cost nothing: two hundred clients promise half a gigabyte each, and a million arguments.
#[test]
fn nothing_is_allocated_from_a_promise() {
    let server = Server::start();
    let before = server.node.resident_bytes();
    let mut clients = Vec::new();
    for number in 0..200 {
        let mut client = server.connect();
        let promise: &[u8] = if number % 2 == 0 {
            b"*1000000\r\n$500000000\r\nx"
        } else {
            b"*2000000000\r\n$3\r\nSET\r\n$500000000\r\nx"
        };
        client.send(promise).unwrap();
        clients.push(client);
    }
    // Served after them, so theirs were read.
    let mut client = server.connect();
    for _ in 0..100 {
        assert_eq!(client.call(&["PING"]), Value::Simple(b"PONG".to_vec()));
    }
    let grown = server.node.resident_bytes().saturating_sub(before);
    // 64 KB a connection would be 13 MB; what they promise is 100 GB.
    assert!(grown < 64 << 20, "200 promises cost {} MB", grown >> 20);
}

/// However many clients vanish in the middle of a request, the others are served and nothing is kept.
#[test]
fn clients_that_vanish_leave_nothing_behind() {
    let server = Server::start();
    for number in 0..300 {
        let mut client = server.connect();
        let half: &[u8] = match number % 3 {
            0 => b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$100\r\nhalf",
            1 => b"MULTI\r\nSET k v\r\nSET",
            _ => b"GET k\r\nGET k\r\nGET",
        };
        client.send(half).unwrap();
    }
    let mut client = server.connect();
    assert_eq!(client.call(&["EXISTS", "k"]), Value::Integer(0));
    eventually!("only this client is left", {
        let list = client.done(&["CLIENT", "LIST"]).text();
        list.trim().lines().count() == 1
    });
}
