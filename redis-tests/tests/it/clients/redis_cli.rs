//! redis-cli in its modes: arguments, standard input, --pipe, --scan, --csv, -3, --bigkeys.

use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Stdio};

use redis_tests::package_corpus::packages;
use redis_tests::{Address, Server, resp};

/// Runs redis-cli and gives what it printed; panics when it failed.
fn redis_cli(address: &Address, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new("redis-cli")
        .args(["-p", &super::port(address).to_string()])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    // What was not read is what redis-cli did not want.
    let _ = writer.join().unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "redis-cli {arguments:?}: {}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

fn text(address: &Address, arguments: &[&str]) -> String {
    String::from_utf8(redis_cli(address, arguments, b"")).unwrap()
}

#[test]
fn commands_as_arguments_and_as_lines() {
    let server = Server::start();
    let address = server.address();
    assert_eq!(text(&address, &["SET", "a", "1"]), "OK\n");
    assert_eq!(text(&address, &["--no-raw", "GET", "a"]), "\"1\"\n");
    assert_eq!(text(&address, &["--no-raw", "GET", "missing"]), "(nil)\n");
    assert_eq!(text(&address, &["--no-raw", "INCR", "a"]), "(integer) 2\n");
    assert_eq!(text(&address, &["--no-raw", "MGET", "a", "b"]), "1) \"2\"\n2) (nil)\n");
    assert_eq!(text(&address, &["--csv", "MGET", "a", "b"]), "\"2\",NULL\n");
    assert_eq!(text(&address, &["-r", "3", "INCR", "a"]), "3\n4\n5\n");
    let lines = redis_cli(&address, &[], b"SET b \"x y\"\nGET b\nNOSUCH\nPING\n");
    assert_eq!(
        String::from_utf8(lines).unwrap(),
        "OK\nx y\nERR unknown command 'NOSUCH', with args beginning with: \n\nPONG\n"
    );
    // The last argument from standard input.
    redis_cli(&address, &["-x", "SET", "binary"], b"\x00\xff\r\n");
    assert_eq!(redis_cli(&address, &["GET", "binary"], b""), b"\x00\xff\r\n\n");
}

#[test]
fn the_newer_protocol() {
    let server = Server::start();
    let address = server.address();
    assert_eq!(
        text(&address, &["-3", "--no-raw", "CONFIG", "GET", "slowlog-max-len"]),
        "1# \"slowlog-max-len\" => \"128\"\n"
    );
    assert!(text(&address, &["-3", "INFO", "server"]).contains("redis_version:7.0."));
    assert_eq!(text(&address, &["-3", "--no-raw", "GET", "missing"]), "(nil)\n");
}

#[test]
fn a_load_by_pipe_is_read_back_and_walked() {
    let server = Server::start();
    let address = server.address();
    let packages = packages(3_000);
    let load: Vec<u8> = packages
        .iter()
        .flat_map(|(name, record)| resp::command(&[b"SET", format!("pkg:{name}").as_bytes(), record]))
        .collect();
    let report = String::from_utf8(redis_cli(&address, &["--pipe"], &load)).unwrap();
    assert!(report.contains("errors: 0, replies: 3000"), "{report}");

    let mut connection = server.connect();
    for (name, record) in &packages {
        let value = connection.call(&["GET", &format!("pkg:{name}")]);
        assert_eq!(value.bytes(), Some(record.as_slice()), "pkg:{name}");
    }

    let listed = text(&address, &["--scan"]);
    let listed: Vec<&str> = listed.lines().collect();
    let expected: BTreeSet<String> = packages.keys().map(|name| format!("pkg:{name}")).collect();
    assert_eq!(listed.len(), expected.len(), "each key is listed once");
    let found: BTreeSet<String> = listed.iter().map(ToString::to_string).collect();
    assert_eq!(found, expected);

    let listed = text(&address, &["--scan", "--pattern", "pkg:a*b*"]);
    let found: BTreeSet<String> = listed.lines().map(ToString::to_string).collect();
    let expected: BTreeSet<String> =
        expected.into_iter().filter(|key| key.strip_prefix("pkg:a").is_some_and(|rest| rest.contains('b'))).collect();
    assert_eq!(found, expected);

    let report = text(&address, &["--bigkeys"]);
    assert!(report.contains("Sampled 3000 keys"), "{report}");
    let report = text(&address, &["--memkeys"]);
    assert!(report.contains("Sampled 3000 keys"), "{report}");
}

#[test]
fn a_load_by_pipe_reports_errors() {
    let server = Server::start();
    let load = b"*1\r\n$4\r\nNOPE\r\n*3\r\n$3\r\nSET\r\n$1\r\na\r\n$1\r\n1\r\n";
    let output = Command::new("bash")
        .args(["-c", "printf '%b' \"$0\" | redis-cli -p \"$1\" --pipe"])
        .arg(String::from_utf8_lossy(load).escape_default().to_string())
        .arg(super::port(&server.address()).to_string())
        .output()
        .unwrap();
    let report = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(report.contains("errors: 1, replies: 2"), "{report}");
}

/// The commands of the session that README.md shows, each with the lines printed below it: none where the page leaves them out.
fn readme_session() -> Vec<(&'static str, Vec<&'static str>)> {
    let readme = include_str!("../../../../README.md");
    let mut session: Vec<(&str, Vec<&str>)> = Vec::new();
    let mut is_inside = false;
    for line in readme.lines() {
        if let Some(command) = line.strip_prefix("    127.0.0.1:6379> ") {
            is_inside = true;
            session.push((command, Vec::new()));
        } else if let (true, Some(printed), Some((_, lines))) =
            (is_inside, line.strip_prefix("    "), session.last_mut())
        {
            lines.push(printed);
        } else {
            is_inside = false;
        }
    }
    session
}

#[test]
fn the_session_in_the_readme_goes_as_it_is_shown() {
    let server = Server::start();
    let session = readme_session();
    assert!(session.len() >= 5, "README.md shows {} commands: has its layout changed?", session.len());
    for (command, lines) in session {
        let arguments: Vec<&str> = ["--no-raw"].into_iter().chain(command.split(' ')).collect();
        let printed = text(&server.address(), &arguments);
        assert!(!printed.starts_with("(error)"), "{command}: {printed}");
        if !lines.is_empty() {
            assert_eq!(printed.lines().collect::<Vec<_>>(), lines, "{command}");
        }
    }
}
