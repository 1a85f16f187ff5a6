//! Commands on when keys expire.

use super::event_time;
use crate::shard::context::{Context, EventTime, Failure, Put, Verdict};
use vasto_proto::batch::write_bytes;
use vasto_proto::command::Args;
use vasto_proto::error::{self, CommandError};

const NX_AND_OTHERS: CommandError =
    CommandError::fixed("ERR NX and XX, GT or LT options at the same time are not compatible");
const GT_AND_LT: CommandError = CommandError::fixed("ERR GT and LT options at the same time are not compatible");

#[derive(Clone, Copy)]
enum Unit {
    Seconds,
    Milliseconds,
}

#[derive(Clone, Copy)]
enum Base {
    Now,
    Epoch,
}

/// When an EXPIRE applies.
#[derive(Clone, Copy, Default)]
struct Conditions {
    without_expiry: bool,
    with_expiry: bool,
    later: bool,
    earlier: bool,
}

/// What is wrong with an EXPIRE's options.
enum OptionError<'a> {
    /// This word is none; it may be any bytes.
    Unsupported(&'a [u8]),
    Conflict(CommandError),
}

impl Conditions {
    /// The conditions, and the text of an event time among them.
    fn parse(mut args: Args<'_>) -> Result<(Self, Option<&[u8]>), OptionError<'_>> {
        let (mut conditions, mut time) = (Self::default(), None);
        while let Some(word) = args.next() {
            match word.to_ascii_lowercase().as_slice() {
                b"nx" => conditions.without_expiry = true,
                b"xx" => conditions.with_expiry = true,
                b"gt" => conditions.later = true,
                b"lt" => conditions.earlier = true,
                b"eventtime" if time.is_none() && !args.is_empty() => time = args.next(),
                _ => return Err(OptionError::Unsupported(word)),
            }
        }
        let Self { without_expiry, with_expiry, later, earlier } = conditions;
        if without_expiry && (with_expiry || later || earlier) {
            Err(OptionError::Conflict(NX_AND_OTHERS))
        } else if later && earlier {
            Err(OptionError::Conflict(GT_AND_LT))
        } else {
            Ok((conditions, time))
        }
    }

    /// `current` is 0 for a key without expiry, which counts as expiring after every other.
    fn allow(self, current: u64, when: i64) -> bool {
        let current = i64::try_from(current).unwrap_or(i64::MAX);
        let expires = current != 0;
        !(self.without_expiry && expires
            || self.with_expiry && !expires
            || self.later && (!expires || when <= current)
            || self.earlier && expires && when >= current)
    }
}

/// The error for an option that is none: its bytes as they came up to a zero byte, line breaks as blanks.
fn reply_unsupported(context: &mut Context<'_>, word: &[u8]) {
    let word = word.split(|byte| *byte == 0).next().unwrap_or_default();
    let end = word.iter().rposition(|byte| !matches!(byte, b'\r' | b'\n')).map_or(0, |last| last + 1);
    let mut text = b"ERR Unsupported option ".to_vec();
    text.extend(word[..end].iter().map(|byte| if matches!(byte, b'\r' | b'\n') { b' ' } else { *byte }));
    let mut packed = vec![b'-'];
    write_bytes(&mut packed, &text);
    context.reply().packed(&packed);
}

fn expire_by(context: &mut Context<'_>, mut args: Args<'_>, name: &str, unit: Unit, base: Base) -> Result<(), Failure> {
    let (key, time) = (args.key()?, args.bytes()?);
    let (conditions, event_time) = match Conditions::parse(args) {
        Ok(options) => options,
        Err(OptionError::Unsupported(word)) => {
            reply_unsupported(context, word);
            return Ok(());
        }
        Err(OptionError::Conflict(error)) => return Err(error.into()),
    };
    let time = vasto_proto::command::args::parse_integer(time).ok_or(error::NOT_AN_INTEGER)?;
    let invalid = || error::invalid_expire_time(name);
    let milliseconds = match unit {
        Unit::Seconds => time.checked_mul(1000).ok_or_else(invalid)?,
        Unit::Milliseconds => time,
    };
    let when = match base {
        Base::Now => milliseconds.checked_add_unsigned(context.now_ms()).ok_or_else(invalid)?,
        Base::Epoch => milliseconds,
    };
    let event_time = event_time.map(|text| event_time::read(context, text)).transpose()?;

    let allowed = context.peek(key)?.is_some_and(|(header, _)| conditions.allow(header.expires_at_ms, when));
    if !allowed {
        context.reply().integer(0);
        return Ok(());
    }
    let verdict = match u64::try_from(when) {
        Ok(when) if when > context.now_ms() => rewrite(context, key, when, event_time)?,
        Ok(_) | Err(_) => context.delete_at(key, event_time)?,
    };
    context.reply().integer(i64::from(verdict.holds()));
    Ok(())
}

/// Writes the row of a key again with another expiry, if there is one and it differs. With an event time also if it does not: the row
/// has that time then.
fn rewrite(
    context: &mut Context<'_>,
    key: &[u8],
    expires_at_ms: u64,
    time: Option<EventTime>,
) -> Result<Verdict, Failure> {
    match context.row(key)? {
        Some(row) if time.is_some() || row.header.expires_at_ms != expires_at_ms => {
            let put = Put { value: &row.value, expires_at_ms, changed_in_place: row.header.changed_in_place };
            context.put_string_at(key, put, time)
        }
        Some(_) | None => Ok(Verdict::Repeated),
    }
}

/// EXPIRE key seconds [NX | XX | GT | LT]… [EVENTTIME unix-ns]
pub fn expire(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    expire_by(context, args, "expire", Unit::Seconds, Base::Now)
}

/// PEXPIRE key milliseconds [NX | XX | GT | LT]… [EVENTTIME unix-ns]
pub fn pexpire(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    expire_by(context, args, "pexpire", Unit::Milliseconds, Base::Now)
}

/// EXPIREAT key unix-seconds [NX | XX | GT | LT]… [EVENTTIME unix-ns]
pub fn expireat(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    expire_by(context, args, "expireat", Unit::Seconds, Base::Epoch)
}

/// PEXPIREAT key unix-milliseconds [NX | XX | GT | LT]… [EVENTTIME unix-ns]
pub fn pexpireat(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    expire_by(context, args, "pexpireat", Unit::Milliseconds, Base::Epoch)
}

fn reply_time(context: &mut Context<'_>, mut args: Args<'_>, unit: Unit, base: Base) -> Result<(), Failure> {
    let now_ms = context.now_ms();
    let expiry = context.peek(args.key()?)?.map(|(header, _)| header.expires_at_ms);
    let answer = match expiry {
        None => -2,
        Some(0) => -1,
        Some(expires_at_ms) => {
            let time = match base {
                Base::Now => expires_at_ms.saturating_sub(now_ms),
                Base::Epoch => expires_at_ms,
            };
            let time = match unit {
                Unit::Seconds => time.saturating_add(500) / 1000,
                Unit::Milliseconds => time,
            };
            i64::try_from(time).unwrap_or(i64::MAX)
        }
    };
    context.reply().integer(answer);
    Ok(())
}

/// TTL key
pub fn ttl(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    reply_time(context, args, Unit::Seconds, Base::Now)
}

/// PTTL key
pub fn pttl(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    reply_time(context, args, Unit::Milliseconds, Base::Now)
}

/// EXPIRETIME key
pub fn expiretime(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    reply_time(context, args, Unit::Seconds, Base::Epoch)
}

/// PEXPIRETIME key
pub fn pexpiretime(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    reply_time(context, args, Unit::Milliseconds, Base::Epoch)
}

/// PERSIST key [EVENTTIME unix-ns]
pub fn persist(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    let key = args.key()?;
    let time = event_time::take_last(context, &mut args)?;
    let expires = context.peek(key)?.is_some_and(|(header, _)| header.expires_at_ms != 0);
    let persists = expires && rewrite(context, key, 0, time)?.holds();
    context.reply().integer(i64::from(persists));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_compare_with_the_expiry_there_is() {
        let conditions = |nx, xx, gt, lt| Conditions { without_expiry: nx, with_expiry: xx, later: gt, earlier: lt };
        let none = conditions(false, false, false, false);
        let nx = conditions(true, false, false, false);
        let xx = conditions(false, true, false, false);
        let gt = conditions(false, false, true, false);
        let lt = conditions(false, false, false, true);
        let (current, allowed) = (0, [none, nx, xx, gt, lt].map(|conditions| conditions.allow(0, 10)));
        assert_eq!((current, allowed), (0, [true, true, false, false, true]));
        assert_eq!(
            [none, nx, xx, gt, lt].map(|conditions| conditions.allow(10, 10)),
            [true, false, true, false, false]
        );
        assert_eq!([none, nx, xx, gt, lt].map(|conditions| conditions.allow(10, 11)), [true, false, true, true, false]);
        assert_eq!([none, nx, xx, gt, lt].map(|conditions| conditions.allow(10, 9)), [true, false, true, false, true]);
    }
}
