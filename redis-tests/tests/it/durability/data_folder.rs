//! A data folder belongs to one process at a time, and to programs that know its format.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use redis_tests::node::{binary, free_address};
use redis_tests::{Connection, Server, Value};

use super::small_with;

/// Runs it to its end; what serves instead is stopped after half a minute, and `timeout` reports that as 124.
fn vasto(arguments: &[&str]) -> Output {
    Command::new("timeout").arg("30").arg(binary()).args(arguments).output().unwrap()
}

fn refused(arguments: &[&str], words: &[&str]) {
    let output = vasto(arguments);
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && output.status.code() != Some(124), "{arguments:?} was accepted:\n{message}");
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    for word in words {
        assert!(message.contains(word), "'{word}' is missing in:\n{message}");
    }
    assert!(!message.contains("panicked"), "{message}");
}

fn fill(connection: &mut Connection, beginning: &str) {
    for number in 0..200 {
        connection.done(&["SET", &format!("{beginning}:{number}"), &number.to_string()]);
    }
}

fn check(connection: &mut Connection, beginning: &str) {
    for number in 0..200 {
        let found = connection.call(&["GET", &format!("{beginning}:{number}")]);
        assert_eq!(found, Value::bulk(number.to_string()), "{beginning}:{number}");
    }
}

#[test]
fn a_folder_that_is_open_is_refused_to_a_second_process() {
    let mut server = Server::start_with(&small_with(&["--shards", "2"]));
    let data = server.data().to_str().unwrap().to_owned();
    let store = server.data().join("store-1").to_str().unwrap().to_owned();
    fill(&mut server.connect(), "first");
    for _ in 0..2 {
        let words = [store.as_str(), "used by another process"];
        refused(&["server", "--listen", &free_address(), "--data", &data], &words);
        // The way through another role, and by another name.
        let store_again = format!("{store}/../store-1");
        let master = free_address();
        refused(&["store", "--master", &master, "--data", &store_again], &["used by another process"]);
        // The first one has noticed nothing.
        let mut connection = server.connect();
        check(&mut connection, "first");
        fill(&mut connection, "second");
        // The lock dies with its process: the file that it leaves behind keeps nobody out.
        server.node.kill_9();
        server.node.start_again();
        let mut connection = server.connect();
        check(&mut connection, "first");
        check(&mut connection, "second");
    }
}

/// Every file of a folder and what is in it, but for the lock.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut contents = BTreeMap::new();
    let mut open = vec![folder.to_owned()];
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            contents.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    contents
}

#[test]
fn a_folder_of_a_newer_format_is_refused_and_left_as_it_was() {
    let mut server = Server::start_with(&small_with(&["--shards", "2"]));
    let data = server.data().to_str().unwrap().to_owned();
    fill(&mut server.connect(), "first");
    server.node.kill_9();
    let identity = server.data().join("store-1/identity");
    let own = fs::read_to_string(&identity).unwrap();
    assert!(own.contains("format=2\n"), "{own}");
    // As a later version might write it: what it adds is not for this one to judge.
    fs::write(&identity, "format=3\nflavour=new\n").unwrap();
    let before = contents(server.data());
    let words = ["store-1", "format version 3", "this program knows 2"];
    refused(&["server", "--listen", &free_address(), "--data", &data], &words);
    let store = server.data().join("store-1").to_str().unwrap().to_owned();
    refused(&["store", "--master", &free_address(), "--data", &store], &words);
    assert_eq!(contents(server.data()), before, "the attempt changed something");
    fs::write(&identity, own).unwrap();
    server.node.start_again();
    check(&mut server.connect(), "first");
}

/// The format before there was a checksum in the identity.
#[test]
fn an_older_identity_is_read_and_written_anew() {
    let mut server = Server::start_with(&small_with(&[]));
    fill(&mut server.connect(), "first");
    assert!(server.node.terminate().success());
    let identity = server.data().join("store-1/identity");
    let own = fs::read_to_string(&identity).unwrap();
    let older: String = own.lines().take(3).map(|line| format!("{}\n", line.replace("format=2", "format=1"))).collect();
    assert_ne!(own, older);
    fs::write(&identity, older).unwrap();
    server.node.start_again();
    check(&mut server.connect(), "first");
    assert_eq!(fs::read_to_string(&identity).unwrap(), own);
}
