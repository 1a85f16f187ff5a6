//! redis-py, by a script of its own: `python/redis_py.py`.

use std::path::Path;
use std::process::Command;

use redis_tests::{Address, Cluster, Server};

fn run(address: &Address) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/redis_py.py");
    let output = Command::new("/usr/bin/python3").arg(script).arg(super::port(address).to_string()).output().unwrap();
    assert!(
        output.status.success(),
        "{}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn commands_of_one_server() {
    run(&Server::start().address());
}

#[test]
fn commands_through_a_cluster() {
    run(&Cluster::builder().stores(2).shards(5).start().address(0));
}
