//! CONFIG: settings of the gateway that was asked.

use super::{Context, Next};
use vasto_proto::command::Args;
use vasto_proto::error::{self, CommandError};

pub fn get(context: &mut Context<'_>, args: Args<'_>) -> Result<Next, CommandError> {
    let found = context.shared.settings.get(args);
    let mut reply = context.reply();
    reply.map(found.len());
    for (name, value) in found {
        reply.bulk(&name);
        reply.bulk(value.as_bytes());
    }
    Ok(Next::Replied)
}

pub fn set(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    if !args.len().is_multiple_of(2) {
        return Err(error::SYNTAX);
    }
    let mut pairs = Vec::with_capacity(args.len() / 2);
    while !args.is_empty() {
        pairs.push((args.bytes()?, args.bytes()?));
    }
    context.shared.settings.set(&pairs)?;
    context.reply().ok();
    Ok(Next::Replied)
}

pub fn resetstat(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    context.shared.statistics.reset();
    context.reply().ok();
    Ok(Next::Replied)
}

pub fn rewrite(_context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    Err(CommandError::fixed("ERR The server is running without a config file"))
}

#[cfg(test)]
mod tests {
    use crate::command::harness::Harness;

    #[test]
    fn answers_are_those_of_redis() {
        Harness::new().script(
            r#"
            > CONFIG GET hz / < {"hz": "10"}
            > CONFIG GET nosuch / < {}
            > CONFIG GET Timeout maxclient* / < {"Timeout": "0", "maxclients": "10000"}
            > CONFIG SET hz 20 timeout 5 / < OK
            > CONFIG GET hz timeout / < {"hz": "20", "timeout": "5"}
            > CONFIG SET hz 10 timeout / < -ERR syntax error
            > CONFIG SET hz 30 foo bar / < -ERR Unknown option or number of arguments for CONFIG SET - 'foo'
            > CONFIG SET hz 30 timeout x / < -ERR CONFIG SET failed (possibly related to argument 'timeout') - argument couldn't be parsed into an integer
            > CONFIG GET hz / < {"hz": "20"}
            > CONFIG GET save appendonly appendfsync / < {"save": "", "appendonly": "yes", "appendfsync": "everysec"}
            > CONFIG RESETSTAT / < OK
            > CONFIG REWRITE / < -ERR The server is running without a config file
            "#,
        );
    }
}
