//! SLOWLOG: the slow commands of the gateway that was asked.

use super::container::wrong_subcommand_arguments;
use super::{Context, Next};
use vasto_proto::command::Args;
use vasto_proto::command::args::parse_integer;
use vasto_proto::error::CommandError;

/// Entries that SLOWLOG GET answers when it is not told how many.
const COUNT_DEFAULT: usize = 10;

pub fn get(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    if args.len() > 1 {
        return Err(wrong_subcommand_arguments("get", "SLOWLOG"));
    }
    let count = match args.next() {
        None => Some(COUNT_DEFAULT),
        Some(count) => match parse_integer(count) {
            Some(-1) => None,
            Some(count) if count >= 0 => Some(usize::try_from(count).unwrap_or(usize::MAX)),
            Some(_) | None => return Err(CommandError::fixed("ERR count should be greater than or equal to -1")),
        },
    };
    let entries = context.shared.slowlog.latest(count);
    let integer = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    let mut reply = context.reply();
    reply.array(entries.len());
    for entry in entries {
        reply.array(6);
        for number in [entry.id, entry.at, entry.duration_us] {
            reply.integer(integer(number));
        }
        reply.array(entry.words.len());
        entry.words.iter().for_each(|word| reply.bulk(word));
        reply.bulk(entry.client_address.as_bytes());
        reply.bulk(&entry.client_name);
    }
    Ok(Next::Replied)
}

pub fn len(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    let count = i64::try_from(context.shared.slowlog.len()).unwrap_or(i64::MAX);
    context.reply().integer(count);
    Ok(Next::Replied)
}

pub fn reset(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    context.shared.slowlog.reset();
    context.reply().ok();
    Ok(Next::Replied)
}

#[cfg(test)]
mod tests {
    use crate::command::harness::Harness;

    #[test]
    fn entries_come_newest_first() {
        let mut harness = Harness::new();
        let shared = &harness.shared;
        for word in ["a", "b"] {
            shared.slowlog.observe(
                &shared.settings,
                20_000,
                || [b"get".as_slice(), word.as_bytes()],
                &harness.session.client,
            );
        }
        let newest = harness.run("SLOWLOG GET 1");
        assert!(
            newest.starts_with("[[1, ") && newest.ends_with(r#", 20000, ["get", "b"], "127.0.0.1:5000", ""]]"#),
            "{newest}"
        );
        harness.script(
            r#"
            > SLOWLOG LEN / < 2
            > SLOWLOG GET 0 / < []
            > SLOWLOG GET a / < -ERR count should be greater than or equal to -1
            > SLOWLOG GET -2 / < -ERR count should be greater than or equal to -1
            > SLOWLOG GET 1 2 / < -ERR unknown subcommand or wrong number of arguments for 'get'. Try SLOWLOG HELP.
            > SLOWLOG RESET / < OK
            > SLOWLOG GET -1 / < []
            "#,
        );
    }
}
