//! RESIZE, REPLACE, STATUS and ABORT as an operator meets them: what is refused and why, what is shown, `vasto admin`.
//!
//! Nothing is moved here: that is tested where data are.

use std::process::{Command, Output};

use redis_tests::node::binary;
use redis_tests::{Address, Cluster, Connection, Server, Value, eventually, notation};

/// Runs `vasto admin --address ADDRESS ARGUMENTS…`.
fn admin(address: &Address, arguments: &[&str]) -> Output {
    let output = Command::new(binary()).args(["admin", "--address", &address.to_string()]).args(arguments).output();
    output.unwrap()
}

fn printed(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn complained(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Everything that is said of a keyspace and where it is.
fn state(connection: &mut Connection) -> String {
    let words: [&[&str]; 3] = [&["KEYSPACE", "INFO", "0"], &["TOPOLOGY"], &["KEYSPACE", "STATUS", "0"]];
    words.iter().map(|words| notation::format(&connection.done(words))).collect()
}

/// The id of a store of a server.
fn a_store(connection: &mut Connection) -> String {
    connection.done(&["STORES"]).elements().unwrap()[0].field("id").unwrap().text()
}

#[test]
fn what_is_refused_changes_nothing_and_says_why() {
    let server = Server::start_with(&["--shards", "2"]);
    let mut connection = server.connect();
    let store = a_store(&mut connection);
    let before = state(&mut connection);
    for (line, texts) in [
        ("RESIZE 0 SHARDS x", &["ERR value is not an integer or out of range"][..]),
        ("RESIZE 0 SHARDS -1", &["ERR value is not an integer or out of range"]),
        ("RESIZE 0 SHARDS 99999999999", &["ERR value is not an integer or out of range"]),
        ("RESIZE 0 SHARDS 2 NOW", &["ERR syntax error"]),
        ("RESIZE 0", &["ERR wrong number of arguments for 'keyspace|resize' command"]),
        ("RESIZE missing SHARDS 3", &["ERR no such keyspace 'missing'"]),
        ("RESIZE missing SHARDS 3 WATCH", &["ERR no such keyspace 'missing'"]),
        ("RESIZE 0 SHARDS 0", &["ERR ", "1 to 1024 shards, not 0"]),
        ("RESIZE 0 SHARDS 1025", &["ERR ", "1 to 1024 shards, not 1025"]),
        ("RESIZE 0 SHARDS 65538", &["ERR ", "1 to 1024 shards, not 65538"]),
        ("RESIZE 0 SHARDS 2", &["ERR ", "has 2 shards already"]),
        ("REPLACE 0", &["ERR wrong number of arguments for 'keyspace|replace' command"]),
        ("REPLACE 0 STORE here", &["ERR STORE and WITH are followed by the id of a store, 8 hexadecimal digits"]),
        ("REPLACE missing STORE 0000000b", &["ERR no such keyspace 'missing'"]),
        ("REPLACE 0 STORE 0000000b", &["ERR ", "0000000b"]),
        ("STATUS missing", &["ERR no such keyspace 'missing'"]),
        ("STATUS", &["ERR wrong number of arguments for 'keyspace|status' command"]),
        ("ABORT missing", &["ERR no such keyspace 'missing'"]),
        ("ABORT 0", &["ERR "]),
        ("ABORT", &["ERR wrong number of arguments for 'keyspace|abort' command"]),
    ] {
        let mut words = vec!["KEYSPACE"];
        words.extend(line.split(' '));
        let answer = connection.call(&words);
        assert!(answer.is_error(), "{line}: {answer:?}");
        let text = answer.text();
        assert!(texts.iter().all(|part| text.contains(part)), "{line}: {text}");
        assert!(!text.contains("older version"), "{line}: {text}");
    }
    // There is no other store.
    let answer = connection.call(&["KEYSPACE", "REPLACE", "0", "STORE", &store]);
    assert!(answer.is_error(), "{answer:?}");
    assert_eq!(state(&mut connection), before);
}

#[test]
fn an_operation_is_not_for_transactions() {
    let server = Server::start();
    let mut connection = server.connect();
    connection.done(&["MULTI"]);
    connection.done(&["KEYSPACE", "RESIZE", "0", "SHARDS", "2"]);
    connection.done(&["KEYSPACE", "STATUS", "0"]);
    let answers = connection.done(&["EXEC"]).elements().unwrap();
    assert!(answers.len() == 2 && answers.iter().all(Value::is_error), "{answers:?}");
    assert_eq!(connection.done(&["KEYSPACE", "INFO", "0"]).field("shards"), Some(Value::Integer(1)));
}

#[test]
fn the_verbs_are_documented() {
    let server = Server::start();
    let mut connection = server.connect();
    let help = connection.done(&["KEYSPACE", "HELP"]).elements().unwrap();
    let help: Vec<String> = help.iter().map(Value::text).collect();
    for (name, arity, line) in [
        ("resize", -5, "RESIZE <name> SHARDS <count> [WATCH]"),
        ("replace", -5, "REPLACE <name> STORE <store> [WITH <store>] [WATCH]"),
        ("status", 3, "STATUS <name>"),
        ("abort", 3, "ABORT <name>"),
    ] {
        assert!(help.iter().any(|known| known == line), "{line}: {help:?}");
        let name = format!("keyspace|{name}");
        let info = connection.done(&["COMMAND", "INFO", &name]).elements().unwrap();
        assert_eq!(info[0].elements().unwrap()[1], Value::Integer(arity), "{name}");
        let docs = notation::format(&connection.done(&["COMMAND", "DOCS", &name]));
        assert!(docs.contains("summary") && docs.contains("keyspace"), "{name}: {docs}");
    }
}

#[test]
fn the_status_of_a_keyspace_without_an_operation_says_so() {
    let server = Server::start();
    let mut connection = server.connect();
    let expected = [Value::bulk("keyspace"), Value::bulk("0"), Value::bulk("operation"), Value::Nil];
    let expected = [&expected[..], &[Value::bulk("phase"), Value::bulk("none")]].concat();
    assert_eq!(connection.done(&["KEYSPACE", "STATUS", "0"]), Value::Array(expected.clone()));
    connection.done(&["HELLO", "3"]);
    let status = connection.done(&["KEYSPACE", "STATUS", "0"]);
    assert!(matches!(status, Value::Map(_)), "{status:?}");
    assert_eq!(status.elements(), Some(expected));
    let info = connection.done(&["KEYSPACE", "INFO", "0"]);
    assert_eq!(info.field("operation"), Some(Value::bulk("")));
    let info = connection.done(&["INFO", "vasto"]).text();
    assert!(info.contains("vasto_operations:0\r\n") && info.contains(",operation=none,"), "{info}");
}

#[test]
fn the_status_is_the_records_while_no_master_can_be_asked() {
    let mut cluster = Cluster::builder().stores(1).shards(1).start();
    let mut connection = cluster.connect(0);
    let before = connection.done(&["KEYSPACE", "STATUS", "0"]);
    cluster.master.kill_9();
    assert_eq!(connection.call(&["KEYSPACE", "STATUS", "0"]), before);
    let missing = connection.call(&["KEYSPACE", "STATUS", "missing"]).text();
    assert!(missing.contains("none can be reached"), "{missing}");
    for line in ["RESIZE 0 SHARDS 2", "ABORT 0"] {
        let mut words = vec!["KEYSPACE"];
        words.extend(line.split(' '));
        let answer = connection.call(&words).text();
        assert!(answer.contains("none can be reached; nothing was changed"), "{line}: {answer}");
    }
    cluster.master.start_again();
    eventually!(
        "a master leads again",
        connection.call(&["KEYSPACE", "ABORT", "0"]).text().starts_with("ERR ")
            && !connection.call(&["KEYSPACE", "ABORT", "0"]).text().contains("master")
    );
}

#[test]
fn the_tool_ends_as_what_it_was_asked_for() {
    let server = Server::start();
    let address = server.address();
    let status = admin(&address, &["status", "0"]);
    assert!(status.status.success(), "{status:?}");
    assert_eq!(printed(&status), "keyspace: 0\nphase: none\n");
    let watched = admin(&address, &["status", "0", "--watch"]);
    assert!(watched.status.success(), "{watched:?}");
    assert_eq!(printed(&watched), "keyspace 0 has had no operation\n");
    for (arguments, text) in [
        (&["status", "missing"][..], "no such keyspace 'missing'"),
        (&["status", "missing", "--watch"], "no such keyspace 'missing'"),
        (&["resize", "missing", "3", "--watch"], "no such keyspace 'missing'"),
        (&["resize", "0", "1"], "has 1 shards already"),
        (&["replace", "0", "--store", "here"], "8 hexadecimal digits"),
        (&["replace", "0", "--store", "0000000b", "--with", "0000000c"], "0000000"),
        (&["abort", "missing"], "no such keyspace 'missing'"),
    ] {
        let output = admin(&address, arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:?}");
        assert_eq!(printed(&output), "", "{arguments:?}");
        assert!(complained(&output).starts_with("vasto: ") && complained(&output).contains(text), "{output:?}");
    }
    let nobody = admin(&Address::Tcp("127.0.0.1:1".parse().unwrap()), &["status", "0"]);
    assert_eq!(nobody.status.code(), Some(1));
    assert!(complained(&nobody).contains("cannot connect to 127.0.0.1:1"), "{nobody:?}");
}

#[test]
fn a_server_with_one_store_is_resized() {
    let server = Server::start();
    let mut connection = server.connect();
    for number in 0..1_000 {
        connection.done(&["SET", &format!("key:{number}"), &number.to_string()]);
    }
    for shards in ["3", "2"] {
        connection.done(&["KEYSPACE", "RESIZE", "0", "SHARDS", shards, "WATCH"]);
        assert_eq!(connection.call(&["DBSIZE"]).integer(), Some(1_000));
    }
}
