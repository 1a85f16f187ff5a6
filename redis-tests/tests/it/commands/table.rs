//! What COMMAND tells about the commands, against what redis-server tells.

use std::collections::{BTreeMap, BTreeSet};

use redis_tests::script::Script;
use redis_tests::{Connection, RedisServer, Server, Value};

/// Commands that redis-server does not have.
const OWN: &[&str] = &["keyslot", "keyspace", "object|eventtime", "stores", "topology"];

/// Subcommands of later versions of Redis that clients ask for.
const OF_LATER_VERSIONS: &[&str] = &["client|setinfo", "client|no-touch"];

/// The entries of COMMAND INFO by name, subcommands included.
fn entries(connection: &mut Connection, names: &[String]) -> BTreeMap<String, Vec<Value>> {
    let mut command = vec!["COMMAND".to_owned(), "INFO".to_owned()];
    command.extend_from_slice(names);
    let mut entries = BTreeMap::new();
    let mut open = connection.done(&command).elements().unwrap();
    while let Some(entry) = open.pop() {
        let Some(fields) = entry.elements() else {
            continue;
        };
        if let Some(subcommands) = fields.get(9).and_then(Value::elements) {
            open.extend(subcommands);
        }
        entries.insert(fields[0].text(), fields);
    }
    entries
}

fn names(connection: &mut Connection) -> Vec<String> {
    let list = connection.done(&["COMMAND", "LIST"]).elements().unwrap();
    let mut names: Vec<String> = list.iter().map(Value::text).filter(|name| !name.contains('|')).collect();
    names.sort();
    names
}

fn set(value: &Value) -> BTreeSet<String> {
    value.elements().unwrap_or_default().iter().map(Value::text).collect()
}

#[test]
fn entries_are_those_of_redis_server() {
    let redis = RedisServer::start();
    let server = Server::start();
    let mut ours = server.connect();
    let names = names(&mut ours);
    let ours = entries(&mut ours, &names);
    let theirs = entries(&mut redis.connect(), &names);
    let mut differences = Vec::new();
    for (name, fields) in &ours {
        if OWN.iter().any(|own| name == own || name.starts_with(&format!("{own}|"))) {
            continue;
        }
        let Some(expected) = theirs.get(name) else {
            if !OF_LATER_VERSIONS.contains(&name.as_str()) {
                differences.push(format!("{name}: redis-server has no such command"));
            }
            continue;
        };
        for (index, field) in
            ["name", "arity", "flags", "first key", "last key", "step", "categories"].iter().enumerate()
        {
            let same = match *field {
                // Sets: their order means nothing.
                "flags" | "categories" => set(&fields[index]) == set(&expected[index]),
                _ => fields[index] == expected[index],
            };
            if !same {
                differences.push(format!(
                    "{name}: {field}: {} instead of {}",
                    redis_tests::notation::format(&fields[index]).replace('\n', " "),
                    redis_tests::notation::format(&expected[index]).replace('\n', " ")
                ));
            }
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn every_command_of_the_table_has_a_script() {
    let server = Server::start();
    let scripted: BTreeSet<String> = super::SCRIPTS
        .iter()
        .flat_map(|name| Script::read(&super::folder().join(name)).commands().collect::<Vec<_>>())
        .collect();
    let missing: Vec<String> = names(&mut server.connect())
        .into_iter()
        .filter(|name| !scripted.contains(&name.to_ascii_uppercase()))
        .collect();
    assert!(missing.is_empty(), "no script has the commands {missing:?}");
}

#[test]
fn every_command_has_documentation() {
    let server = Server::start();
    let mut connection = server.connect();
    let names = names(&mut connection);
    assert!(names.len() > 70, "only {} commands", names.len());
    let docs = connection.done(&["COMMAND", "DOCS"]).elements().unwrap();
    let mut documented: Vec<String> = docs.iter().step_by(2).map(Value::text).collect();
    documented.sort();
    assert_eq!(documented, names);
    for pair in docs.chunks(2) {
        let fields = pair[1].elements().unwrap();
        let summary = fields.iter().position(|field| field.text() == "summary");
        let text = summary.and_then(|position| fields.get(position + 1)).map(Value::text);
        assert!(text.is_some_and(|text| !text.is_empty()), "{} has no summary", pair[0].text());
    }
    let count = connection.done(&["COMMAND", "COUNT"]).integer().unwrap();
    assert_eq!(count as usize, names.len());
    let all = connection.done(&["COMMAND"]).elements().unwrap();
    assert_eq!(all.len(), names.len());
}
