//! Every command by scripts: the same file is proven against redis-server and then asked of Vasto, of one shard and of many.

use std::path::{Path, PathBuf};

use redis_tests::script::{Script, Target};
use redis_tests::{RedisServer, Server};

mod table;

/// Where the scripts lie.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/commands/scripts")
}

fn check(name: &str, target: Target) {
    let script = Script::read(&folder().join(name));
    let failures = match target {
        Target::Redis => script.failures(&RedisServer::start().address(), target),
        Target::OneShard => script.failures(&Server::start_with(&["--databases", "1"]).address(), target),
        Target::ManyShards => {
            let server = Server::start_with(&["--stores", "2", "--shards", "5", "--databases", "1"]);
            script.failures(&server.address(), target)
        }
    };
    assert!(failures.is_empty(), "{} of the cases failed:\n\n{}\n", failures.len(), failures.join("\n\n"));
}

macro_rules! scripts {
    ($($name:ident)*) => {
        /// The expectations themselves are true.
        mod redis_server {
            $(#[test]
            fn $name() {
                super::check(concat!(stringify!($name), ".script"), super::Target::Redis);
            })*
        }

        mod one_shard {
            $(#[test]
            fn $name() {
                super::check(concat!(stringify!($name), ".script"), super::Target::OneShard);
            })*
        }

        mod many_shards {
            $(#[test]
            fn $name() {
                super::check(concat!(stringify!($name), ".script"), super::Target::ManyShards);
            })*
        }

        /// The names of all scripts.
        pub const SCRIPTS: &[&str] = &[$(concat!(stringify!($name), ".script")),*];
    };
}

scripts! {
    across_shards
    backup
    client
    command
    connection
    copies
    counters
    dump
    event_time
    expiry
    keys
    many_keys
    own
    ranges
    scan
    server
    strings
    transactions
}

#[test]
fn every_script_of_the_folder_is_run() {
    let mut files: Vec<String> =
        std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    files.sort();
    assert_eq!(files, SCRIPTS);
}
