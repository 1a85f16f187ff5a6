//! The shape of the house: who may use what, read off the sources.

use std::path::{Path, PathBuf};

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every Rust source below a folder of the workspace, by its path from there.
fn sources(folder: &str) -> Vec<(String, String)> {
    let root = workspace();
    let mut open = vec![root.join(folder)];
    let mut sources = Vec::new();
    while let Some(path) = open.pop() {
        if path.is_dir() {
            let mut entries: Vec<PathBuf> = std::fs::read_dir(&path)
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
                .map(|entry| entry.unwrap().path())
                .collect();
            entries.sort();
            open.extend(entries);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
            sources.push((name, std::fs::read_to_string(&path).unwrap()));
        }
    }
    assert!(!sources.is_empty(), "no sources in {folder}");
    sources
}

/// The places where code, not comments, names something of a crate.
fn uses(sources: &[(String, String)], krate: &str) -> Vec<String> {
    let mut places = Vec::new();
    for (name, text) in sources {
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let named = [format!("{krate}::"), format!("use {krate};"), format!("extern crate {krate}")];
            let found = named.iter().any(|word| {
                code.match_indices(word.as_str()).any(|(position, _)| {
                    let before = code[..position].chars().next_back();
                    // Not the end of a longer name, nor a module of another crate.
                    !before.is_some_and(|letter| letter.is_alphanumeric() || letter == '_' || letter == ':')
                })
            });
            if found {
                places.push(format!("{name}:{}", number + 1));
            }
        }
    }
    places
}

fn only_in(krate: &str, allowed: impl Fn(&str) -> bool) {
    let mut all = Vec::new();
    for folder in ["proto", "gateway", "store", "master", "vasto"] {
        all.extend(sources(&format!("{folder}/src")));
    }
    let wrong: Vec<String> =
        uses(&all, krate).into_iter().filter(|place| !allowed(place.rsplit_once(':').unwrap().0)).collect();
    assert!(wrong.is_empty(), "{krate} is used outside of its place:\n{}", wrong.join("\n"));
}

#[test]
fn rocksdb_has_one_door() {
    only_in("rocksdb", |file| file.starts_with("store/src/engine"));
}

#[test]
fn redis_protocol_has_one_door() {
    only_in("redis_protocol", |file| file.starts_with("gateway/src/resp"));
}

#[test]
fn tonic_is_used_in_rpc_modules_alone() {
    only_in("tonic", |file| {
        file.starts_with("proto/src/")
            || file.starts_with("gateway/src/upstream")
            || file.contains("/rpc/")
            || file.ends_with("/rpc.rs")
    });
}

/// The one file whose unsafe code a reader must check.
const UNSAFE_FILE: &str = "store/src/engine/changed_value.rs";

#[test]
fn unsafe_code_has_one_place() {
    let mut files = Vec::new();
    for folder in ["proto", "gateway", "store", "master", "vasto", "redis-tests"] {
        for (name, text) in sources(folder) {
            let code = text.lines().map(|line| line.split("//").next().unwrap_or_default());
            // Written apart, or this file would find itself.
            if code.into_iter().any(|line| line.contains(concat!("uns", "afe"))) {
                files.push(name);
            }
        }
    }
    files.retain(|name| name != "redis-tests/tests/it/tidy.rs");
    assert_eq!(files, [UNSAFE_FILE]);
}

#[test]
fn the_roles_depend_on_the_contract_alone() {
    for role in ["gateway", "store", "master"] {
        let manifest = std::fs::read_to_string(workspace().join(role).join("Cargo.toml")).unwrap();
        let ours: Vec<&str> = manifest
            .lines()
            .filter(|line| line.starts_with("vasto"))
            .map(|line| line.split(['.', ' ', '=']).next().unwrap_or_default())
            .collect();
        assert_eq!(ours, ["vasto-proto"], "{role}/Cargo.toml");
    }
    let manifest = std::fs::read_to_string(workspace().join("proto/Cargo.toml")).unwrap();
    let ours = manifest.lines().filter(|line| line.starts_with("vasto")).count();
    assert_eq!(ours, 0, "proto depends on none of ours");
}

#[test]
fn every_file_says_what_it_is_for() {
    let mut silent = Vec::new();
    for folder in ["proto", "gateway", "store", "master", "vasto", "redis-tests"] {
        for (name, text) in sources(folder) {
            if !text.starts_with("//!") {
                silent.push(name);
            }
        }
    }
    assert!(silent.is_empty(), "no first line that says it: {silent:?}");
}

#[test]
fn no_file_is_named_after_nothing() {
    let nothing = ["util", "utils", "common", "helper", "helpers", "misc", "manager"];
    let mut wrong = Vec::new();
    for folder in ["proto", "gateway", "store", "master", "vasto", "redis-tests"] {
        for (name, _) in sources(folder) {
            let stem = Path::new(&name).file_stem().unwrap().to_str().unwrap().to_owned();
            if nothing.contains(&stem.as_str()) {
                wrong.push(name);
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn no_test_is_ignored() {
    let mut ignored = Vec::new();
    for folder in ["proto", "gateway", "store", "master", "vasto", "redis-tests"] {
        for (name, text) in sources(folder) {
            // Written apart, or this line would find itself.
            if text.contains(concat!("#[", "ignore")) {
                ignored.push(name);
            }
        }
    }
    assert!(ignored.is_empty(), "{ignored:?}");
}
