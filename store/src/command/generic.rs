//! Commands on keys of any type.

use super::{before_event_time, event_time};
use crate::shard::context::{Context, Failure, Put, Row, Verdict};
use vasto_proto::command::Args;
use vasto_proto::command::args::parse_integer;
use vasto_proto::command::table::StoreCommand;
use vasto_proto::error::{self, CommandError};
use vasto_proto::key::SLOT_BYTES;
use vasto_proto::row::Header;

const NO_LFU_POLICY: CommandError = CommandError::fixed(
    "ERR An LFU maxmemory policy is not selected, access frequency not tracked. Please note that when switching \
     between policies at runtime LRU and LFU data will take some time to adjust.",
);
const INDEX_NO_INT: CommandError =
    CommandError::fixed("ERR value is out of range, value must between -2147483648 and 2147483647");

/// DEL key…, DEL key EVENTTIME unix-ns
pub fn del(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    let keys = before_event_time(StoreCommand::Del, args, args.len());
    if keys < args.len() {
        return del_at(context, args, keys);
    }
    let mut deleted = 0;
    for key in args {
        deleted += i64::from(context.peek(key)?.is_some());
        context.delete(key)?;
    }
    context.reply().integer(deleted);
    Ok(())
}

/// The answer counts, as without an event time, the keys that are gone by it.
fn del_at(context: &mut Context<'_>, mut args: Args<'_>, keys: usize) -> Result<(), Failure> {
    if keys != 1 {
        return Err(error::EVENT_TIME_OF_SEVERAL.into());
    }
    let key = args.key()?;
    let time = event_time::take_last(context, &mut args)?;
    let existed = context.peek(key)?.is_some();
    let verdict = context.delete_at(key, time)?;
    context.reply().integer(i64::from(existed && verdict == Verdict::Written));
    Ok(())
}

/// EXISTS key…
pub fn exists(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    let mut existing = 0;
    for key in args {
        existing += i64::from(context.peek(key)?.is_some());
    }
    context.reply().integer(existing);
    Ok(())
}

/// TYPE key
pub fn type_of(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    let exists = context.peek(args.key()?)?.is_some();
    context.reply().simple(if exists { "string" } else { "none" });
    Ok(())
}

fn put_row(context: &mut Context<'_>, key: &[u8], row: &Row) -> Result<(), Failure> {
    let Header { expires_at_ms, changed_in_place, .. } = row.header;
    context.put_string(key, Put { value: &row.value, expires_at_ms, changed_in_place })
}

enum Renamed {
    Done,
    SameKey,
    TargetExists,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Overwrite {
    Yes,
    No,
}

fn rename_to(context: &mut Context<'_>, mut args: Args<'_>, overwrite: Overwrite) -> Result<Renamed, Failure> {
    let (source, target) = (args.key()?, args.key()?);
    let row = context.row(source)?.ok_or(error::NO_SUCH_KEY)?;
    if source == target {
        return Ok(Renamed::SameKey);
    }
    if overwrite == Overwrite::No && context.peek(target)?.is_some() {
        return Ok(Renamed::TargetExists);
    }
    put_row(context, target, &row)?;
    context.delete(source)?;
    Ok(Renamed::Done)
}

/// RENAME key newkey
pub fn rename(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    rename_to(context, args, Overwrite::Yes)?;
    context.reply().ok();
    Ok(())
}

/// RENAMENX key newkey
pub fn renamenx(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    let renamed = match rename_to(context, args, Overwrite::No)? {
        Renamed::Done => 1,
        Renamed::SameKey | Renamed::TargetExists => 0,
    };
    context.reply().integer(renamed);
    Ok(())
}

/// What Redis has of databases by default; what the gateway lets SELECT take is its own matter.
const DATABASES_MAX: i64 = 16;

/// COPY source destination [DB index] [REPLACE]; within the keyspace alone.
pub fn copy(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    let (source, target) = (args.key()?, args.key()?);
    let mut overwrite = Overwrite::No;
    while !args.is_empty() {
        if args.option("REPLACE") {
            overwrite = Overwrite::Yes;
        } else if args.len() > 1 && args.option("DB") {
            let index = args.integer()?;
            if i32::try_from(index).is_err() {
                return Err(INDEX_NO_INT.into());
            }
            if !(0..DATABASES_MAX).contains(&index) {
                return Err(error::DB_INDEX_OUT_OF_RANGE.into());
            }
            if Some(index) != context.database_number() {
                return Err(error::NOT_BETWEEN_KEYSPACES.into());
            }
        } else {
            return Err(error::SYNTAX.into());
        }
    }
    if source == target {
        return Err(error::SAME_OBJECT.into());
    }
    let row = context.row(source)?;
    let blocked = overwrite == Overwrite::No && context.peek(target)?.is_some();
    let copied = match row {
        Some(row) if !blocked => {
            put_row(context, target, &row)?;
            true
        }
        Some(_) | None => false,
    };
    context.reply().integer(i64::from(copied));
    Ok(())
}

/// Redis keeps an integer text of up to 20 bytes as a number and a text of up to 44 bytes in one piece with its object.
fn encoding(header: &Header, value: &[u8]) -> &'static str {
    if header.changed_in_place {
        "raw"
    } else if value.len() <= 20 && parse_integer(value).is_some() {
        "int"
    } else if value.len() <= 44 {
        "embstr"
    } else {
        "raw"
    }
}

/// Redis shares the objects of integers below 10,000 and counts their references as this.
const SHARED_REFERENCES: i64 = i32::MAX as i64;

fn reference_count(header: &Header, value: &[u8]) -> i64 {
    match parse_integer(value) {
        Some(0..10_000) if !header.changed_in_place => SHARED_REFERENCES,
        Some(_) | None => 1,
    }
}

/// OBJECT ENCODING key
pub fn object_encoding(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    match context.peek(args.key()?)?.map(|(header, value)| encoding(&header, value)) {
        Some(name) => context.reply().bulk(name.as_bytes()),
        None => context.reply().null(),
    }
    Ok(())
}

/// OBJECT REFCOUNT key
pub fn object_refcount(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    match context.peek(args.key()?)?.map(|(header, value)| reference_count(&header, value)) {
        Some(count) => context.reply().integer(count),
        None => context.reply().null(),
    }
    Ok(())
}

/// OBJECT IDLETIME key
pub fn object_idletime(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    match context.peek(args.key()?)?.is_some() {
        true => context.reply().integer(0),
        false => context.reply().null(),
    }
    Ok(())
}

/// OBJECT FREQ key
pub fn object_freq(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    if context.peek(args.key()?)?.is_some() {
        return Err(NO_LFU_POLICY.into());
    }
    context.reply().null();
    Ok(())
}

/// OBJECT EVENTTIME key
pub fn object_eventtime(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    match context.peek(args.key()?)?.map(|(header, _)| header.stamp.ns) {
        Some(ns) => context.reply().integer(i64::try_from(ns).unwrap_or(i64::MAX)),
        None => context.reply().null(),
    }
    Ok(())
}

/// MEMORY USAGE key [SAMPLES count]
pub fn memory_usage(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    let key = args.key()?;
    while !args.is_empty() {
        // The samples are for collections; a string is counted whole.
        if args.len() < 2 || !args.option("SAMPLES") {
            return Err(error::SYNTAX.into());
        }
        if args.integer()? < 0 {
            return Err(error::SYNTAX.into());
        }
    }
    let bytes = context.peek(key)?.map(|(header, value)| SLOT_BYTES + key.len() + header.encoded_bytes() + value.len());
    match bytes {
        Some(bytes) => context.reply().integer(i64::try_from(bytes).expect("a row is shorter than 2^63 bytes")),
        None => context.reply().null(),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vasto_proto::row::{RowKind, Stamp};

    #[test]
    fn encodings_are_those_of_redis() {
        let header = |changed_in_place| Header {
            kind: RowKind::String,
            stamp: Stamp::default(),
            expires_at_ms: 0,
            changed_in_place,
            written_at_ns: 0,
        };
        for (value, in_place, expected) in [
            ("1", false, "int"),
            ("1", true, "raw"),
            ("-9223372036854775808", false, "int"),
            ("9223372036854775808", false, "embstr"),
            ("01", false, "embstr"),
            ("", false, "embstr"),
            ("12345678901234567890123456789012345678901234", false, "embstr"),
            ("123456789012345678901234567890123456789012345", false, "raw"),
        ] {
            assert_eq!(encoding(&header(in_place), value.as_bytes()), expected, "{value:?}");
        }
    }
}
