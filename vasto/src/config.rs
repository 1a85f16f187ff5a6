//! From the command line and the file that it names to options.
//!
//! Each entry of the file becomes an option put before those of the command line, so both are read by the same parser and
//! every option can stand in either place.

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Context, bail};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, CommandFactory, FromArgMatches};
use toml::{Table, Value};

use crate::cli::{Cli, Role};

/// What runs when the command line names no role.
const DEFAULT_ROLE: &str = "server";

/// Reads the options; prints help or what is wrong with the command line, and ends the process, as clap does.
pub fn parse(arguments: Vec<OsString>) -> anyhow::Result<Role> {
    let arguments = with_role(arguments);
    let matches = Cli::command().try_get_matches_from(&arguments).unwrap_or_else(|error| error.exit());
    let Some(path) = config_path(&matches) else {
        return Ok(Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit()).role);
    };
    let read = || {
        let text = std::fs::read_to_string(&path)?;
        role_from_file(&arguments, &matches, &text)
    };
    read().with_context(|| format!("configuration file {}", Path::new(&path).display()))
}

/// Inserts the default role where options stand in its place.
fn with_role(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let first = arguments.get(1).and_then(|first| first.to_str());
    let is_for_all = matches!(first, Some("-h" | "--help" | "-V" | "--version"));
    if first.is_none_or(|first| first.starts_with('-')) && !is_for_all {
        arguments.insert(1.min(arguments.len()), DEFAULT_ROLE.into());
    }
    arguments
}

fn config_path(matches: &ArgMatches) -> Option<std::path::PathBuf> {
    let (_, options) = matches.subcommand()?;
    // Roles without this option, such as bench, answer an error.
    options.try_get_one("config").ok().flatten().cloned()
}

fn role_from_file(arguments: &[OsString], matches: &ArgMatches, text: &str) -> anyhow::Result<Role> {
    let (role, given) = matches.subcommand().context("a role was inserted")?;
    let added = options_of_file(role, given, text)?;
    let mut all = arguments.to_vec();
    // Behind the program's name and the role.
    all.splice(2..2, added);
    let parsed = Cli::command().try_get_matches_from(all).and_then(|matches| Cli::from_arg_matches(&matches));
    // The command line alone was fine; clap's first line says which option of the file is not.
    let cli = parsed.map_err(|error| {
        let text = error.to_string();
        let line = text.lines().next().unwrap_or_default();
        anyhow::anyhow!("{}", line.trim_start_matches("error: "))
    })?;
    Ok(cli.role)
}

/// The options of one role in the file, without those that the command line gives.
fn options_of_file(role: &str, given: &ArgMatches, text: &str) -> anyhow::Result<Vec<OsString>> {
    let table: Table = text.parse().map_err(|error| syntax_error(text, &error))?;
    let mut command = Cli::command();
    command.build();
    let roles: Vec<&Command> = command.get_subcommands().filter(|role| has_option(role, "config")).collect();
    let own = roles.iter().find(|command| command.get_name() == role).context("the role has a configuration")?;

    let mut unknown = Vec::new();
    let mut chosen = Table::new();
    for (key, value) in &table {
        match (roles.iter().find(|role| role.get_name() == key), value) {
            (Some(role), Value::Table(section)) => {
                let strange = section.keys().filter(|key| !has_option(role, key) || *key == "config");
                unknown.extend(strange.map(|strange| format!("{strange} in [{key}]")));
            }
            _ if key == "config" || !roles.iter().any(|role| has_option(role, key)) => unknown.push(key.clone()),
            _ if has_option(own, key) => drop(chosen.insert(key.clone(), value.clone())),
            // For another role: one file may serve all.
            _ => {}
        }
    }
    if !unknown.is_empty() {
        bail!("unknown options: {}", unknown.join(", "));
    }
    if let Some(Value::Table(section)) = table.get(role) {
        chosen.extend(section.clone());
    }

    let mut options = Vec::new();
    for (key, value) in &chosen {
        let argument = own.get_arguments().find(|argument| is_called(argument, key));
        let argument = argument.context("only known options were chosen")?;
        if given.value_source(argument.get_id().as_str()) == Some(ValueSource::CommandLine) {
            continue;
        }
        let is_switch = matches!(argument.get_action(), ArgAction::SetTrue);
        match value {
            Value::Boolean(on) if is_switch => options.extend(on.then(|| OsString::from(format!("--{key}")))),
            Value::Array(values) => {
                for value in values {
                    options.push(option(key, value)?);
                }
            }
            value => options.push(option(key, value)?),
        }
    }
    Ok(options)
}

fn option(key: &str, value: &Value) -> anyhow::Result<OsString> {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Integer(number) => number.to_string(),
        Value::Float(number) => number.to_string(),
        Value::Boolean(_) | Value::Datetime(_) | Value::Array(_) | Value::Table(_) => {
            bail!("{key} must be a text or a number, or a list of them")
        }
    };
    Ok(format!("--{key}={text}").into())
}

fn has_option(role: &Command, name: &str) -> bool {
    // Every command has a --help, which is no option of the role.
    name != "help" && role.get_arguments().any(|argument| is_called(argument, name))
}

fn is_called(argument: &Arg, name: &str) -> bool {
    argument.get_long_and_visible_aliases().is_some_and(|names| names.contains(&name))
}

/// One line, with the number of the line in the file.
fn syntax_error(text: &str, error: &toml::de::Error) -> anyhow::Error {
    let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
    let line = before.matches('\n').count() + 1;
    anyhow::anyhow!("line {line}: {}", error.message().replace('\n', ", "))
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::cli::{Bytes, GatewayOptions, ServerOptions, StoreOptions};

    fn arguments(line: &str) -> Vec<OsString> {
        with_role(line.split_whitespace().map(OsString::from).collect())
    }

    fn read(line: &str, file: &str) -> Result<Role, String> {
        let arguments = arguments(line);
        let matches = Cli::command().try_get_matches_from(&arguments).unwrap();
        role_from_file(&arguments, &matches, file).map_err(|error| format!("{error:#}"))
    }

    fn server(line: &str, file: &str) -> ServerOptions {
        let Role::Server(options) = read(line, file).unwrap() else { panic!("server was asked for") };
        options
    }

    fn gateway(line: &str, file: &str) -> GatewayOptions {
        let Role::Gateway(options) = read(line, file).unwrap() else { panic!("gateway was asked for") };
        options
    }

    fn store(line: &str, file: &str) -> StoreOptions {
        let Role::Store(options) = read(line, file).unwrap() else { panic!("store was asked for") };
        options
    }

    #[test]
    fn without_a_role_it_is_the_server() {
        for line in ["vasto", "vasto --stores 2", "vasto server --stores 2"] {
            let matches = Cli::command().try_get_matches_from(arguments(line)).unwrap();
            assert_eq!(matches.subcommand_name(), Some("server"), "{line}");
        }
        assert_eq!(arguments("vasto --help").len(), 2);
        assert_eq!(arguments("vasto bench --help").len(), 3);
    }

    #[test]
    fn the_command_line_wins_over_the_file_and_the_file_over_defaults() {
        let file = "stores = 3\nrow-cache = \"1mb\"\nlisten = [\"127.0.0.1:1\", \"127.0.0.1:2\"]";
        let options = server("vasto", file);
        assert_eq!((options.stores, options.storage.row_cache), (3, Bytes(1 << 20)));
        assert_eq!(options.listen.len(), 2);
        assert_eq!(options.storage.block_cache, Bytes(256 << 20));
        let options = server("vasto --stores 4 --listen 127.0.0.1:9", file);
        assert_eq!((options.stores, options.storage.row_cache), (4, Bytes(1 << 20)));
        assert_eq!(options.listen, ["127.0.0.1:9".parse().unwrap()]);
    }

    #[test]
    fn one_file_serves_all_roles() {
        let file = "master = \"m:1\"\nlog = \"warn\"\nmaxclients = 7\n[store]\ndata = \"/d\"\nlog = \"debug\"\n[gateway]\nlisten = \"127.0.0.1:5\"";
        let gateway = gateway("vasto gateway", file);
        assert_eq!((gateway.clients.maxclients, gateway.process.log.as_str()), (7, "warn"));
        assert_eq!(
            (gateway.master.masters, gateway.listen),
            (vec!["m:1".to_owned()], vec!["127.0.0.1:5".parse().unwrap()])
        );
        let store = store("vasto store --master a:1,b:2", file);
        assert_eq!((store.data, store.process.log), ("/d".into(), "debug".to_owned()));
        assert_eq!(store.master.masters, ["a:1", "b:2"]);
    }

    #[test]
    fn a_section_of_the_master_does_not_hide_its_address() {
        let file = "masters = [\"a:1\", \"b:2\"]\n[master]\nlisten = \"127.0.0.1:5\"";
        assert_eq!(gateway("vasto gateway", file).master.masters, ["a:1", "b:2"]);
        assert_eq!(gateway("vasto gateway --master c:3", file).master.masters, ["c:3"]);
        let Role::Master(master) = read("vasto master", file).unwrap() else { panic!("master was asked for") };
        assert_eq!(master.listen.port(), 5);
    }

    #[test]
    fn mistakes_in_the_file_are_named() {
        for (file, text) in [
            ("port = 1\n[store]\nmaxclients = 2", "unknown options: port, maxclients in [store]"),
            ("[storage]\nx = 1", "unknown options: storage"),
            ("config = \"x\"", "unknown options: config"),
            ("help = 1", "unknown options: help"),
            ("stores = 0", "invalid value '0' for '--stores <COUNT>': 0 is not in 1..=64"),
            ("stores = true", "stores must be a text or a number, or a list of them"),
        ] {
            assert_eq!(read("vasto", file).unwrap_err(), text, "{file}");
        }
        assert!(read("vasto", "shards = 1\nstores = ").unwrap_err().starts_with("line 2: "));
    }
}
