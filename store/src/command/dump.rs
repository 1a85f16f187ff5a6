//! DUMP and RESTORE: values in Redis's own format.

use crate::shard::context::{Context, Failure, Put};
use vasto_proto::command::Args;
use vasto_proto::command::args::parse_integer;
use vasto_proto::error::{self, CommandError};
use vasto_proto::rdb::payload::{PayloadError, StringPayload, dump_string};

const BUSY_KEY: CommandError = CommandError::fixed("BUSYKEY Target key name already exists.");
const WRONG_FOOTER: CommandError = CommandError::fixed("ERR DUMP payload version or checksum are wrong");
const BAD_DATA: CommandError = CommandError::fixed("ERR Bad data format");
const NEGATIVE_TTL: CommandError = CommandError::fixed("ERR Invalid TTL value, must be >= 0");
const NEGATIVE_IDLE_TIME: CommandError = CommandError::fixed("ERR Invalid IDLETIME value, must be >= 0");
const FREQUENCY_OUT_OF_RANGE: CommandError = CommandError::fixed("ERR Invalid FREQ value, must be >= 0 and <= 255");

/// DUMP key
pub fn dump(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    let payload = context.peek(args.key()?)?.map(|(_, value)| dump_string(value));
    match payload {
        Some(payload) => context.reply().bulk(&payload),
        None => context.reply().null(),
    }
    Ok(())
}

#[derive(Clone, Copy, Default)]
struct RestoreOptions {
    replaces: bool,
    is_absolute: bool,
}

impl RestoreOptions {
    fn parse(mut args: Args<'_>) -> Result<Self, CommandError> {
        let mut options = Self::default();
        let (mut has_idle_time, mut has_frequency) = (false, false);
        while !args.is_empty() {
            let has_value = args.len() > 1;
            if args.option("REPLACE") {
                options.replaces = true;
            } else if args.option("ABSTTL") {
                options.is_absolute = true;
            } else if has_value && !has_frequency && args.option("IDLETIME") {
                // Checked and dropped, as the frequency: access times are not kept.
                if args.integer()? < 0 {
                    return Err(NEGATIVE_IDLE_TIME);
                }
                has_idle_time = true;
            } else if has_value && !has_idle_time && args.option("FREQ") {
                if !(0..=255).contains(&args.integer()?) {
                    return Err(FREQUENCY_OUT_OF_RANGE);
                }
                has_frequency = true;
            } else {
                return Err(error::SYNTAX);
            }
        }
        Ok(options)
    }
}

fn refusal(error: PayloadError) -> CommandError {
    match error {
        PayloadError::Footer => WRONG_FOOTER,
        PayloadError::Value(_) | PayloadError::UnknownType(_) => BAD_DATA,
        PayloadError::OtherKind(kind) => {
            format!("ERR only strings are kept so far; the DUMP payload holds a {kind}").into()
        }
    }
}

/// A value that becomes longer than this is made in the lane: a worker would hold up others meanwhile.
const FAR_BYTES: u64 = 256 << 10;

/// Whether RESTORE with these arguments makes a long value of a short payload.
pub fn restore_is_far(mut args: Args<'_>) -> bool {
    let payload = args.nth(2).and_then(StringPayload::peek);
    payload.and_then(|payload| payload.promised_bytes()).is_some_and(|bytes| bytes > FAR_BYTES)
}

/// RESTORE key ttl serialized-value [REPLACE] [ABSTTL] [IDLETIME seconds] [FREQ frequency]
pub fn restore(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    let (key, ttl, payload) = (args.key()?, args.bytes()?, args.bytes()?);
    let options = RestoreOptions::parse(args)?;
    if !options.replaces && context.peek(key)?.is_some() {
        return Err(BUSY_KEY.into());
    }
    let ttl = parse_integer(ttl).ok_or(error::NOT_AN_INTEGER)?;
    if ttl < 0 {
        return Err(NEGATIVE_TTL.into());
    }
    let payload = StringPayload::open(payload).map_err(refusal)?;
    if let Some(bytes) = payload.promised_bytes() {
        if bytes > context.limits().proto_max_bulk_len as u64 {
            return Err(error::STRING_TOO_LONG.into());
        }
        context.admit_value(bytes as usize)?;
    }
    let value = payload.value().map_err(refusal)?;
    let when = match (ttl, options.is_absolute) {
        (0, _) | (_, true) => ttl,
        // A sum beyond the end of time wraps and lies in the past, as in Redis.
        (ttl, false) => ttl.wrapping_add_unsigned(context.now_ms()),
    };
    match u64::try_from(when) {
        Ok(expires_at_ms) if expires_at_ms == 0 || expires_at_ms > context.now_ms() => {
            context.put_string(key, Put { value: &value, expires_at_ms, changed_in_place: false })?;
        }
        // It has expired before it was here.
        Ok(_) | Err(_) => {
            if context.peek(key)?.is_some() {
                context.delete(key)?;
            }
        }
    }
    context.reply().ok();
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::script::{Script, text};
    use super::*;
    use crate::config::Config;
    use vasto_proto::batch::Outcome;
    use vasto_proto::command::Reply;
    use vasto_proto::command::table::StoreCommand;
    use vasto_proto::rdb::crc64::crc64;

    fn dumped(script: &mut Script, key: &[u8]) -> Vec<u8> {
        let reply = script.ask(StoreCommand::Dump, &[key]);
        match Reply::take(&mut reply.as_slice()) {
            Some(Reply::Bulk(payload)) => payload.to_vec(),
            other => panic!("no payload: {other:?}"),
        }
    }

    #[test]
    fn every_value_comes_back_with_and_without_a_time_to_live() {
        let mut script = Script::new();
        for value in [&b""[..], b"abc", b"-5", b"2147483648", &b"ab".repeat(5000), &[0xff; 100], &[b'x'; 1 << 20]] {
            script.ask(StoreCommand::Set, &[b"k", value]);
            let payload = dumped(&mut script, b"k");
            for ttl in ["0", "33177117420123"] {
                let arguments: [&[u8]; 5] = [b"k", ttl.as_bytes(), &payload, b"REPLACE", b"ABSTTL"];
                assert_eq!(text(&script.ask(StoreCommand::Restore, &arguments)), "OK");
                assert_eq!(dumped(&mut script, b"k"), payload);
                let expected = if ttl == "0" { "-1" } else { ttl };
                assert_eq!(script.line("PEXPIRETIME k"), format!("(integer) {expected}"));
            }
        }
    }

    #[test]
    fn a_bomb_is_refused_before_it_is_made() {
        let mut script = Script::with_config(Config { proto_max_bulk_len: 1 << 20, ..Config::default() });
        // 264 bytes of each three.
        let mut compressed = vec![0, b'a'];
        compressed.extend([0xe0, 0xff, 0].repeat(8000));
        let mut payload = vec![0, 0xc3];
        vasto_proto::rdb::string::write_length(compressed.len(), &mut payload);
        vasto_proto::rdb::string::write_length(1 + 264 * 8000, &mut payload);
        payload.extend(compressed);
        payload.extend(10u16.to_le_bytes());
        payload.extend(crc64(&payload).to_le_bytes());
        let reply = text(&script.ask(StoreCommand::Restore, &[b"k", b"0", &payload]));
        assert_eq!(reply, "(error) ERR string exceeds maximum allowed size (proto-max-bulk-len)");
        let mut script = Script::new();
        assert_eq!(text(&script.ask(StoreCommand::Restore, &[b"k", b"0", &payload])), "OK");
        assert_eq!(script.line("STRLEN k"), "(integer) 2112001");
    }

    #[test]
    fn a_value_that_becomes_large_waits_for_its_permit() {
        let mut script = Script::new();
        let payload = dump_string(&vec![b'x'; 17 << 20]);
        let (outcome, _) = script.operate(StoreCommand::Restore, &[b"k", b"0", &payload]);
        assert_eq!(outcome, Outcome::NeedsLargePermit);
    }
}
