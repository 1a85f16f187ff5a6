//! CLIENT: what this gateway knows of its connections, and what may be done to them.

use super::container::wrong_subcommand_arguments;
use super::{Context, Next};
use crate::clients::{ClientRecord, PauseMode, unix_ms};
use crate::session::ReplyMode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use vasto_proto::command::Args;
use vasto_proto::command::args::parse_integer;
use vasto_proto::error::{self, CommandError};

/// A name that would not break a line of CLIENT LIST: printable ASCII without blanks.
fn is_one_word(text: &[u8]) -> bool {
    text.iter().all(|byte| (b'!'..=b'~').contains(byte))
}

pub fn valid_name(name: &[u8]) -> Result<&[u8], CommandError> {
    if is_one_word(name) {
        Ok(name)
    } else {
        Err(CommandError::fixed("ERR Client names cannot contain spaces, newlines or special characters."))
    }
}

/// A time to wait in milliseconds, with the errors that Redis has for it.
pub fn timeout_ms(text: &[u8]) -> Result<u64, CommandError> {
    let number = parse_integer(text).ok_or(CommandError::fixed("ERR timeout is not an integer or out of range"))?;
    u64::try_from(number).map_err(|_| CommandError::fixed("ERR timeout is negative"))
}

fn quoted(before: &str, bytes: &[u8]) -> CommandError {
    let text = format!("{before} '{}'", error::printed(bytes));
    error::single_line(&text).into_owned().into()
}

/// What CLIENT LIST TYPE and CLIENT KILL TYPE may name; all connections here are normal ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ClientType {
    Normal,
    Replica,
    PubSub,
    Master,
}

fn client_type(word: &[u8]) -> Result<ClientType, CommandError> {
    Ok(match word.to_ascii_lowercase().as_slice() {
        b"normal" => ClientType::Normal,
        b"slave" | b"replica" => ClientType::Replica,
        b"pubsub" => ClientType::PubSub,
        b"master" => ClientType::Master,
        _ => return Err(quoted("ERR Unknown client type", word)),
    })
}

pub fn id(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    let id = i64::try_from(context.session.client.id).expect("fewer than 2^63 connections");
    context.reply().integer(id);
    Ok(Next::Replied)
}

pub fn info(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    let line = context.session.client.line(unix_ms()) + "\n";
    context.reply().verbatim(&line);
    Ok(Next::Replied)
}

pub fn list(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let clients = &context.shared.clients;
    let now_ms = unix_ms();
    let mut text = String::new();
    let mut add = |client: &ClientRecord| {
        text.push_str(&client.line(now_ms));
        text.push('\n');
    };
    if args.is_empty() {
        clients.all().iter().for_each(|client| add(client));
    } else if args.len() == 2 && args.option("type") {
        if client_type(args.bytes()?)? == ClientType::Normal {
            clients.all().iter().for_each(|client| add(client));
        }
    } else if args.len() >= 2 && args.option("id") {
        for id in args {
            let id = parse_integer(id).ok_or(CommandError::fixed("ERR Invalid client ID"))?;
            if let Some(client) = u64::try_from(id).ok().and_then(|id| clients.get(id)) {
                add(&client);
            }
        }
    } else {
        return Err(error::SYNTAX);
    }
    context.reply().verbatim(&text);
    Ok(Next::Replied)
}

/// Which connections CLIENT KILL means.
#[derive(Debug)]
struct KillFilter<'a> {
    id: Option<u64>,
    address: Option<&'a [u8]>,
    local_address: Option<&'a [u8]>,
    client_type: Option<ClientType>,
    skip_me: bool,
}

impl KillFilter<'_> {
    fn matches(&self, client: &ClientRecord, me: u64) -> bool {
        self.id.is_none_or(|id| id == client.id)
            && self.address.is_none_or(|address| address == client.peer_address.as_bytes())
            && self.local_address.is_none_or(|address| address == client.local_address.as_bytes())
            && self.client_type.is_none_or(|client_type| client_type == ClientType::Normal)
            && !(self.skip_me && client.id == me)
    }
}

fn kill_filter<'a>(mut args: Args<'a>) -> Result<KillFilter<'a>, CommandError> {
    let mut filter = KillFilter { id: None, address: None, local_address: None, client_type: None, skip_me: true };
    if args.len() == 1 {
        // The old form; with it one can kill oneself.
        filter.address = args.next();
        filter.skip_me = false;
        return Ok(filter);
    }
    while let Some(option) = args.next() {
        let value = args.bytes()?;
        match option.to_ascii_lowercase().as_slice() {
            b"id" => {
                let id = parse_integer(value).and_then(|id| u64::try_from(id).ok()).filter(|id| *id > 0);
                filter.id = Some(id.ok_or(CommandError::fixed("ERR client-id should be greater than 0"))?);
            }
            b"type" => filter.client_type = Some(client_type(value)?),
            b"addr" => filter.address = Some(value),
            b"laddr" => filter.local_address = Some(value),
            b"user" if value == b"default" => {}
            b"user" => return Err(quoted("ERR No such user", value)),
            b"skipme" => {
                filter.skip_me = match value.to_ascii_lowercase().as_slice() {
                    b"yes" => true,
                    b"no" => false,
                    _ => return Err(error::SYNTAX),
                }
            }
            _ => return Err(error::SYNTAX),
        }
    }
    Ok(filter)
}

pub fn kill(context: &mut Context<'_>, args: Args<'_>) -> Result<Next, CommandError> {
    let old_form = args.len() == 1;
    let filter = kill_filter(args)?;
    let me = context.session.client.id;
    let (mut killed, mut killed_me) = (0, false);
    for client in context.shared.clients.all() {
        if !filter.matches(&client, me) {
            continue;
        }
        killed += 1;
        if client.id == me {
            // This connection closes when its reply has left.
            killed_me = true;
        } else {
            client.kill();
        }
    }
    if !old_form {
        context.reply().integer(killed);
    } else if killed > 0 {
        context.reply().ok();
    } else {
        return Err(CommandError::fixed("ERR No such client"));
    }
    Ok(if killed_me { Next::RepliedThenClose } else { Next::Replied })
}

pub fn setname(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let name = valid_name(args.bytes()?)?.to_vec();
    context.session.client.change_names(|names| names.name = name);
    context.reply().ok();
    Ok(Next::Replied)
}

pub fn getname(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    let name = context.session.client.names().name;
    if name.is_empty() {
        context.reply().null();
    } else {
        context.reply().bulk(&name);
    }
    Ok(Next::Replied)
}

pub fn setinfo(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let (option, value) = (args.bytes()?, args.bytes()?);
    let is_name = option.eq_ignore_ascii_case(b"lib-name");
    if !is_name && !option.eq_ignore_ascii_case(b"lib-ver") {
        return Err(quoted("ERR Unrecognized option", option));
    }
    if !is_one_word(value) {
        let option = error::printed(option);
        return Err(format!("ERR {option} cannot contain spaces, newlines or special characters.").into());
    }
    let value = value.to_vec();
    context.session.client.change_names(|names| {
        if is_name {
            names.library_name = value;
        } else {
            names.library_version = value;
        }
    });
    context.reply().ok();
    Ok(Next::Replied)
}

fn on_or_off(args: &mut Args<'_>) -> Result<bool, CommandError> {
    if args.option("on") {
        Ok(true)
    } else if args.option("off") {
        Ok(false)
    } else {
        Err(error::SYNTAX)
    }
}

fn switch(
    context: &mut Context<'_>,
    mut args: Args<'_>,
    flag: fn(&ClientRecord) -> &AtomicBool,
) -> Result<Next, CommandError> {
    flag(&context.session.client).store(on_or_off(&mut args)?, Ordering::Relaxed);
    context.reply().ok();
    Ok(Next::Replied)
}

pub fn no_evict(context: &mut Context<'_>, args: Args<'_>) -> Result<Next, CommandError> {
    switch(context, args, |client| &client.no_evict)
}

pub fn no_touch(context: &mut Context<'_>, args: Args<'_>) -> Result<Next, CommandError> {
    switch(context, args, |client| &client.no_touch)
}

pub fn reply(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let mode = &mut context.session.reply_mode;
    if args.option("on") {
        *mode = ReplyMode::On;
        context.reply().ok();
        return Ok(Next::Replied);
    }
    if args.option("off") {
        *mode = ReplyMode::Off;
    } else if args.option("skip") {
        if *mode != ReplyMode::Off {
            *mode = ReplyMode::SkipNext;
        }
    } else {
        return Err(error::SYNTAX);
    }
    Ok(Next::Silent)
}

pub fn pause(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    if args.len() > 2 {
        return Err(wrong_subcommand_arguments("pause", "CLIENT"));
    }
    let timeout = args.bytes()?;
    let mode = if args.is_empty() || args.option("all") {
        PauseMode::All
    } else if args.option("write") {
        PauseMode::Write
    } else {
        return Err(CommandError::fixed("ERR CLIENT PAUSE mode must be WRITE or ALL"));
    };
    context.shared.clients.pause(Duration::from_millis(timeout_ms(timeout)?), mode);
    context.reply().ok();
    Ok(Next::Replied)
}

pub fn unpause(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    context.shared.clients.unpause();
    context.reply().ok();
    Ok(Next::Replied)
}

#[cfg(test)]
mod tests {
    use crate::clients::PauseMode;
    use crate::command::harness::Harness;
    use crate::session::ReplyMode;

    #[test]
    fn answers_are_those_of_redis() {
        Harness::new().script(
            r#"
            > CLIENT ID / < 1
            > CLIENT LIST TYPE foo / < -ERR Unknown client type 'foo'
            > CLIENT LIST TYPE master / < txt:""
            > CLIENT LIST ID a / < -ERR Invalid client ID
            > CLIENT LIST ID 99 / < txt:""
            > CLIENT LIST foo / < -ERR syntax error
            > CLIENT LIST TYPE / < -ERR syntax error
            > CLIENT KILL a / < -ERR No such client
            > CLIENT KILL ID 0 / < -ERR client-id should be greater than 0
            > CLIENT KILL ID a / < -ERR client-id should be greater than 0
            > CLIENT KILL ID 99 / < 0
            > CLIENT KILL ID / < -ERR No such client
            > CLIENT KILL ID 1 TYPE / < -ERR syntax error
            > CLIENT KILL TYPE x / < -ERR Unknown client type 'x'
            > CLIENT KILL USER nope / < -ERR No such user 'nope'
            > CLIENT KILL USER default SKIPME maybe / < -ERR syntax error
            > CLIENT KILL ID 1 / < 0
            > CLIENT KILL ID 1 SKIPME no / < 1
            > CLIENT SETNAME "a b" / < -ERR Client names cannot contain spaces, newlines or special characters.
            > CLIENT SETNAME me / < OK
            > CLIENT GETNAME / < "me"
            > CLIENT SETNAME "" / < OK
            > CLIENT GETNAME / < null
            > CLIENT SETINFO lib-name redis-py / < OK
            > CLIENT SETINFO LIB-VER "1 2" / < -ERR LIB-VER cannot contain spaces, newlines or special characters.
            > CLIENT SETINFO foo bar / < -ERR Unrecognized option 'foo'
            > CLIENT NO-EVICT x / < -ERR syntax error
            > CLIENT NO-EVICT on / < OK
            > CLIENT NO-TOUCH off / < OK
            > CLIENT REPLY x / < -ERR syntax error
            > CLIENT REPLY on / < OK
            > CLIENT PAUSE x / < -ERR timeout is not an integer or out of range
            > CLIENT PAUSE -1 / < -ERR timeout is negative
            > CLIENT PAUSE x foo / < -ERR CLIENT PAUSE mode must be WRITE or ALL
            > CLIENT PAUSE 1 write x / < -ERR unknown subcommand or wrong number of arguments for 'pause'. Try CLIENT HELP.
            > CLIENT PAUSE 0 / < OK
            > CLIENT UNPAUSE / < OK
            "#,
        );
    }

    #[test]
    fn a_line_describes_the_connection() {
        let mut harness = Harness::new();
        harness.run("CLIENT SETNAME me");
        harness.run("CLIENT SETINFO lib-name redis-py");
        let line = harness.run("CLIENT INFO");
        for part in [
            "txt:\"id=1 addr=127.0.0.1:5000 laddr=127.0.0.1:6379 ",
            " name=me ",
            " flags=N db=0 ",
            " resp=2 lib-name=redis-py lib-ver=\\n\"",
        ] {
            assert!(line.contains(part), "{part} in {line}");
        }
        assert_eq!(harness.run("CLIENT LIST"), line);
        assert_eq!(harness.run("CLIENT LIST ID 7 1"), line);
    }

    #[test]
    fn others_are_killed_at_once_and_oneself_after_the_reply() {
        let mut harness = Harness::new();
        let other = harness.shared.clients.register("10.0.0.1:1".into(), "127.0.0.1:6379".into(), false);
        assert_eq!(harness.run("CLIENT KILL 10.0.0.1:1"), "OK");
        assert!(other.is_killed() && !harness.session.client.is_killed());
        assert_eq!(harness.run("CLIENT KILL 127.0.0.1:5000"), "OK");
        assert!(harness.closes);
    }

    #[test]
    fn pauses_and_reply_modes_are_kept() {
        let mut harness = Harness::new();
        harness.run("CLIENT PAUSE 100000 write");
        assert_eq!(harness.shared.clients.pause_state().map(|pause| pause.mode), Some(PauseMode::Write));
        assert_eq!(harness.run("CLIENT REPLY skip"), "(silent)");
        assert_eq!(harness.session.reply_mode, ReplyMode::SkipNext);
        harness.run("CLIENT REPLY off");
        harness.run("CLIENT REPLY skip");
        assert_eq!(harness.session.reply_mode, ReplyMode::Off);
    }
}
