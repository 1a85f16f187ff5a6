//! redis-benchmark with its default tests.

use std::process::Command;

use redis_tests::{Server, heavy};

/// Tests of redis-benchmark whose commands are strings or none.
const OURS: &[&str] = &["PING_INLINE", "PING_MBULK", "SET", "GET", "INCR", "MSET (10 keys)"];

fn run(server: &Server, options: &[&str]) -> (String, String, bool) {
    let output = Command::new("redis-benchmark")
        .args(["-p", &super::port(&server.address()).to_string()])
        .args(options)
        .output()
        .unwrap();
    (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
        output.status.success(),
    )
}

fn throughput(csv: &str, test: &str) -> f64 {
    let line = csv
        .lines()
        .find(|line| line.starts_with(&format!("\"{test}\",")))
        .unwrap_or_else(|| panic!("no result for {test}:\n{csv}"));
    let field = line.split("\",\"").nth(1).unwrap_or_default();
    field.trim_matches('"').parse().unwrap_or_else(|_| panic!("no number: {line}"))
}

#[test]
fn tests_of_our_commands_run_without_errors() {
    let _turn = heavy();
    let server = Server::start();
    for pipeline in ["1", "16"] {
        let options = ["-n", "20000", "-q", "--csv", "-P", pipeline, "-r", "1000", "-t", "ping,set,get,incr,mset"];
        let (csv, errors, success) = run(&server, &options);
        assert!(success, "{csv}\n{errors}");
        assert!(!csv.contains("Error") && errors.is_empty(), "{csv}\n{errors}");
        for test in OURS {
            assert!(throughput(&csv, test) > 0.0, "{csv}");
        }
    }
}

/// What fails are commands on collections, and the text says which. redis-benchmark stops at the first
/// error, so each of its default tests is run on its own too.
#[test]
fn the_default_run_fails_on_collections_alone() {
    let _turn = heavy();
    let server = Server::start();
    let (csv, errors, _) = run(&server, &["-n", "1000", "-q", "--csv"]);
    for test in ["PING_INLINE", "PING_MBULK", "SET", "GET", "INCR"] {
        assert!(throughput(&csv, test) > 0.0, "{csv}");
    }
    says_so_cleanly(&csv, &errors);
    for test in ["lpush", "rpush", "lpop", "rpop", "sadd", "hset", "spop", "zadd", "zpopmin", "lrange", "mset"] {
        let (csv, errors, success) = run(&server, &["-n", "1000", "-q", "--csv", "-t", test]);
        if test == "mset" {
            assert!(success && throughput(&csv, "MSET (10 keys)") > 0.0, "{csv}\n{errors}");
        }
        says_so_cleanly(&csv, &errors);
    }
    // The server has survived it.
    assert_eq!(server.connect().done(&["PING"]).text(), "PONG");
}

fn says_so_cleanly(csv: &str, errors: &str) {
    let collections = ["LPUSH", "RPUSH", "LPOP", "RPOP", "SADD", "HSET", "SPOP", "ZADD", "ZPOPMIN", "LRANGE"];
    for line in csv.lines().chain(errors.lines()).filter(|line| line.contains("rror")) {
        let clean =
            line.contains("unknown command") && collections.iter().any(|name| line.contains(&format!("'{name}'")));
        assert!(clean, "not the fault of a collection: {line}");
    }
}
