//! A shard whose folder is damaged or gone: it says so, the others serve, and it serves again when the folder is restored.

use std::fs;
use std::path::{Path, PathBuf};

use redis_tests::cluster::temporary_directory;
use redis_tests::{Connection, Node, Value, eventually, heavy};

use super::{check_values, start_server, value_of};

const KEYS: usize = 300;
const VALUE_BYTES: usize = 100;

/// A server with three shards whose keys are all in files.
fn filled(directory: &Path, data: &Path) -> Node {
    let mut node = start_server(directory, data, &["--shards", "3", "--request-deadline-ms", "300"]);
    let mut connection = Connection::open(&node.redis_address());
    for number in 0..KEYS {
        connection.done(&[b"SET".to_vec(), format!("key:{number}").into_bytes(), value_of(number, VALUE_BYTES)]);
    }
    assert!(node.terminate().success());
    node
}

/// The numbers of the keys that are served, and one of the errors for the others.
fn look(connection: &mut Connection) -> (Vec<usize>, Option<String>) {
    let commands: Vec<Vec<String>> = (0..KEYS).map(|number| vec!["GET".to_owned(), format!("key:{number}")]).collect();
    let mut served = Vec::new();
    let mut error = None;
    for (number, reply) in connection.pipeline(&commands).unwrap().into_iter().enumerate() {
        if reply.is_error() {
            error = Some(reply.text());
        } else {
            assert_eq!(reply, Value::bulk(value_of(number, VALUE_BYTES)), "key:{number}");
            served.push(number);
        }
    }
    (served, error)
}

fn is_whole(node: &Node) -> bool {
    look(&mut Connection::open(&node.redis_address())).0.len() == KEYS
}

fn file(folder: &Path, prefix: &str) -> PathBuf {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.into_iter().find(|path| path.file_name().unwrap().to_str().unwrap().starts_with(prefix)).unwrap()
}

/// The damage is done while the server is down; the returned function undoes it while it runs.
fn check(damage: impl FnOnce(&Path) -> (String, Box<dyn FnOnce()>)) {
    let _turn = heavy();
    let directory = temporary_directory();
    let data = directory.path().join("data");
    let mut node = filled(directory.path(), &data);
    let shard = data.join("store-1/shards/0-1");
    let (named, restore) = damage(&shard);
    node.start_again();
    let mut connection = Connection::open(&node.redis_address());
    let (served, error) = look(&mut connection);
    assert!(served.len() > KEYS / 3 && served.len() < KEYS, "{} of {KEYS} are served", served.len());
    let error = error.unwrap();
    eprintln!("{error}");
    for part in
        ["CLUSTERDOWN ", "nothing was executed", "shard 0/1 ", &named, "restore the shard's folder from a backup"]
    {
        assert!(error.contains(part), "'{part}' is not in: {error}");
    }
    assert!(node.log().contains(&named), "{}", node.log());
    // The others take writes.
    let key = format!("key:{}", served[0]);
    connection.done(&[b"SET".to_vec(), key.into_bytes(), value_of(served[0], VALUE_BYTES)]);
    restore();
    eventually!(60 s, "the shard is served again", is_whole(&node));
    check_values(&mut connection, &(0..KEYS).collect::<Vec<_>>(), VALUE_BYTES);
}

#[test]
fn a_shard_with_a_damaged_manifest_says_so_and_is_served_when_restored() {
    check(|shard| {
        let manifest = file(shard, "MANIFEST-");
        let content = fs::read(&manifest).unwrap();
        let mut damaged = content.clone();
        damaged[content.len() / 2] ^= 1;
        fs::write(&manifest, damaged).unwrap();
        (manifest.to_str().unwrap().to_owned(), Box::new(move || fs::write(manifest, content).unwrap()))
    });
}

#[test]
fn a_shard_without_its_folder_is_not_taken_for_an_empty_one() {
    check(|shard| {
        let (shard, away) = (shard.to_owned(), shard.with_extension("away"));
        fs::rename(&shard, &away).unwrap();
        (shard.to_str().unwrap().to_owned(), Box::new(move || fs::rename(away, shard).unwrap()))
    });
}

#[test]
fn a_shard_that_has_lost_its_current_is_not_taken_for_an_empty_one() {
    check(|shard| {
        let current = shard.join("CURRENT");
        let content = fs::read(&current).unwrap();
        fs::remove_file(&current).unwrap();
        (current.to_str().unwrap().to_owned(), Box::new(move || fs::write(current, content).unwrap()))
    });
}
