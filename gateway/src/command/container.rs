//! Containers: commands whose second word chooses one, their HELP, and what is said when there is no such word.

use super::{Context, Next};
use vasto_proto::command::Args;
use vasto_proto::error::{self, CommandError};

/// Bytes of an unknown subcommand that an error repeats, as Redis does.
const SHOWN_BYTES_MAX: usize = 128;

/// The container has no such subcommand.
pub fn unknown_subcommand(container: &str, word: &[u8]) -> CommandError {
    let word = error::printed(&word[..word.len().min(SHOWN_BYTES_MAX)]);
    let text = format!("ERR unknown subcommand '{word}'. Try {} HELP.", container.to_uppercase());
    error::single_line(&text).into_owned().into()
}

/// What Redis says when a subcommand itself finds that it has too many arguments.
pub fn wrong_subcommand_arguments(word: &str, container: &str) -> CommandError {
    format!("ERR unknown subcommand or wrong number of arguments for '{word}'. Try {container} HELP.").into()
}

/// A container without a subcommand of its own. The dispatcher answers it before it comes here: it looks for the subcommand first.
pub fn missing(_context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let word = String::from_utf8_lossy(args.bytes()?).into_owned();
    Err(error::single_line(&format!("ERR unknown subcommand '{word}'.")).into_owned().into())
}

fn help(context: &mut Context<'_>, container: &str, lines: &[&str]) -> Result<Next, CommandError> {
    let mut reply = context.reply();
    reply.array(lines.len() + 3);
    reply.simple(&format!("{container} <subcommand> [<arg> [value] [opt] ...]. Subcommands are:"));
    lines.iter().for_each(|line| reply.simple(line));
    reply.simple("HELP");
    reply.simple("    Prints this help.");
    Ok(Next::Replied)
}

pub fn object_help(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    help(
        context,
        "OBJECT",
        &[
            "ENCODING <key>",
            "    How Redis would keep the value.",
            "EVENTTIME <key>",
            "    The event time of the key's row, in Unix nanoseconds.",
            "FREQ <key>",
            "    Answers that no LFU policy is chosen.",
            "IDLETIME <key>",
            "    0 for a key that exists: access times are not kept.",
            "REFCOUNT <key>",
            "    1 for a key that exists.",
        ],
    )
}

pub fn client_help(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    help(
        context,
        "CLIENT",
        &[
            "GETNAME",
            "    The name of this connection.",
            "ID",
            "    The id of this connection.",
            "INFO",
            "    Describes this connection.",
            "KILL <ip:port>",
            "    Closes the connection from this address.",
            "KILL <option> <value> [<option> <value> [...]]",
            "    Closes all connections of this gateway that fit the options:",
            "    ADDR <address>, LADDR <address>, ID <id>, TYPE <type>, USER <name>, SKIPME (YES|NO)",
            "LIST [TYPE <type> | ID <id> [...]]",
            "    Describes the connections of this gateway.",
            "NO-EVICT (ON|OFF)",
            "    Accepted; connections are not evicted for memory.",
            "NO-TOUCH (ON|OFF)",
            "    Accepted; access times are not kept.",
            "PAUSE <timeout> [WRITE|ALL]",
            "    Holds up all commands, or those that write, for <timeout> milliseconds.",
            "REPLY (ON|OFF|SKIP)",
            "    Switches the replies to this connection.",
            "SETINFO (LIB-NAME|LIB-VER) <text>",
            "    Notes the client library's name or version.",
            "SETNAME <name>",
            "    Names this connection.",
            "UNPAUSE",
            "    Ends a pause.",
        ],
    )
}

pub fn command_help(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    help(
        context,
        "COMMAND",
        &[
            "(no subcommand)",
            "    Describes all commands.",
            "COUNT",
            "    Counts the commands.",
            "DOCS [<command-name> ...]",
            "    Documents some or all commands.",
            "GETKEYS <full-command>",
            "    The keys in a command line.",
            "GETKEYSANDFLAGS <full-command>",
            "    The keys in a command line and how it uses them.",
            "INFO [<command-name> ...]",
            "    Describes some or all commands.",
            "LIST [FILTERBY (MODULE <name>|ACLCAT <category>|PATTERN <pattern>)]",
            "    The names of all commands, or of those that fit.",
        ],
    )
}

pub fn config_help(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    help(
        context,
        "CONFIG",
        &[
            "GET <pattern> [<pattern> ...]",
            "    The settings whose names fit, with their values.",
            "SET <name> <value> [<name> <value> ...]",
            "    Changes all of the settings, or none.",
            "RESETSTAT",
            "    Sets the counters of INFO back to zero.",
            "REWRITE",
            "    Answers that there is no configuration file to rewrite.",
        ],
    )
}

pub fn memory_help(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    help(
        context,
        "MEMORY",
        &[
            "DOCTOR",
            "    Says whether memory needs attention.",
            "MALLOC-STATS",
            "    What the kernel counts of this process's memory.",
            "PURGE",
            "    Accepted; the allocator gives memory back by itself.",
            "STATS",
            "    What memory is used for, here and in the stores.",
            "USAGE <key> [SAMPLES <count>]",
            "    The bytes of a key's row.",
        ],
    )
}

pub fn slowlog_help(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    help(
        context,
        "SLOWLOG",
        &[
            "GET [<count>]",
            "    The newest <count> entries (default: 10, -1 = all), each with its",
            "    id, Unix time, microseconds, command line, client address and client name.",
            "LEN",
            "    Counts the entries.",
            "RESET",
            "    Empties the log.",
        ],
    )
}

pub fn keyspace_help(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    help(
        context,
        "KEYSPACE",
        &[
            "ABORT <name>",
            "    Ends the operation of a keyspace (RESIZE, REPLACE) as if it had not begun; refused when it is committed.",
            "COMPACT <name>",
            "    Rewrites the files of a keyspace without its dead rows; answers when it is done.",
            "ALTER <name> [COPIES <count>] [FSYNC (ALWAYS|EVERYSEC|NO)] [MIN-REPLICAS <count>] [STRICT (YES|NO)]",
            "    Changes how many copies of each shard there are, when writes reach the disk for good, how many replicas must have",
            "    them before they are answered, and whether a primary stops that may have been replaced.",
            "CREATE <name> SHARDS <count> [COPIES <count>] [FSYNC (ALWAYS|EVERYSEC|NO)] [MIN-REPLICAS <count>] [STRICT (YES|NO)]",
            "    Creates a keyspace; SELECT <name> chooses it.",
            "FAILOVER <name> SHARD <number> [TO <store>]",
            "    Gives a shard another primary, without loss.",
            "DROP <name> CONFIRM",
            "    Drops a keyspace with all its data, for good.",
            "INFO <name>",
            "    One keyspace with its shards and who serves them.",
            "LIST",
            "    All keyspaces.",
            "REPLACE <name> STORE <store> [WITH <store>] [WATCH]",
            "    Gives the copies that a store has of a keyspace to another one, or to the best; answers as RESIZE.",
            "RESIZE <name> SHARDS <count> [WATCH]",
            "    Gives a keyspace another number of shards while it serves. Answers the number of the operation at once; with WATCH",
            "    OK when it is done, an error with the reason when it was aborted, and nothing else of the connection runs meanwhile.",
            "STATUS <name>",
            "    How far the operation of a keyspace is, or how the last one ended: a map, with times in seconds, but for behind_ms,",
            "    and the rate in bytes per second; what only the master knows is null while none can be asked.",
            "VERIFY <name>",
            "    Compares the copies of every shard, one shard after the other; those that differ from their primary are made anew.",
        ],
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::harness::Harness;
    use vasto_proto::command::Flags;
    use vasto_proto::command::table::Command;

    #[test]
    fn an_unknown_subcommand_is_named_on_one_line_and_not_at_length() {
        assert_eq!(unknown_subcommand("object", b"foo").text(), "ERR unknown subcommand 'foo'. Try OBJECT HELP.");
        assert_eq!(unknown_subcommand("client", b"a\r\nb").text(), "ERR unknown subcommand 'a  b'. Try CLIENT HELP.");
        assert!(unknown_subcommand("client", &[b'x'; 1000]).text().len() < 200);
    }

    #[test]
    fn help_names_every_subcommand() {
        for container in Command::all().filter(|command| command.spec().flags.contains(Flags::CONTAINER)) {
            let container = container.spec().name;
            if container == "debug" {
                continue;
            }
            let help = Harness::new().run(&format!("{container} HELP"));
            for sub in Command::subcommands(container) {
                let word = sub.spec().name.split_once('|').expect("a subcommand").1.to_uppercase();
                assert!(help.contains(&format!("+{word}")), "{container} {word}: {help}");
            }
        }
    }
}
