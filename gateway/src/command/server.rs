//! Commands on the process that was asked: its clock, its end, and what stock clients and tests ask besides.

use super::{Context, Next};
use crate::clients::unix_ms;
use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use vasto_proto::REDIS_VERSION;
use vasto_proto::command::Args;
use vasto_proto::error::{self, CommandError};

/// Bytes of what a client sent that an error text quotes, as in Redis.
const QUOTED_BYTES_MAX: usize = 128;
/// Longest sleep that DEBUG SLEEP takes: longer ones are a mistake, and a year is long enough for a test.
const SLEEP_SECONDS_MAX: f64 = 365.0 * 24.0 * 3600.0;

pub fn time(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let mut reply = context.reply();
    reply.array(2);
    reply.bulk(since.as_secs().to_string().as_bytes());
    reply.bulk(since.subsec_micros().to_string().as_bytes());
    Ok(Next::Replied)
}

/// Rows and columns of the picture.
const PICTURE_ROWS: u32 = 8;
const PICTURE_COLUMNS: u32 = 32;

/// A skyline that the clock draws: the further to the right, the higher the towers may be.
fn picture(mut seed: u64) -> String {
    let mut next = |below: u32| {
        seed = vasto_proto::slot::splitmix64(seed);
        (seed % u64::from(below)) as u32
    };
    let heights: Vec<u32> =
        (0..PICTURE_COLUMNS).map(|column| next(2 + column * PICTURE_ROWS / PICTURE_COLUMNS)).collect();
    let mut text = String::new();
    for row in (0..PICTURE_ROWS).rev() {
        let line: String = heights.iter().map(|height| if *height > row { '▓' } else { ' ' }).collect();
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

pub fn lolwut(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    // `LOLWUT VERSION n` chooses among Redis's pictures; there is one here.
    if args.len() >= 2 && args.option("version") {
        args.integer()?;
    }
    let text = format!("{}\nRedis ver. {REDIS_VERSION}\n", picture(unix_ms()));
    context.reply().verbatim(&text);
    Ok(Next::Replied)
}

/// DEBUG SLEEP seconds; Redis has no rows for DEBUG's subcommands either.
pub fn debug(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let subcommand = args.bytes()?;
    if !subcommand.eq_ignore_ascii_case(b"sleep") || args.len() != 1 {
        let subcommand = error::printed(&subcommand[..subcommand.len().min(QUOTED_BYTES_MAX)]);
        let text = format!("ERR unknown subcommand or wrong number of arguments for '{subcommand}'. Try DEBUG HELP.");
        return Err(text.into());
    }
    // What is no number is 0, as strtod reads it.
    let seconds: f64 = std::str::from_utf8(args.bytes()?).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0.0);
    let seconds = if seconds.is_nan() { 0.0 } else { seconds.clamp(0.0, SLEEP_SECONDS_MAX) };
    context.reply().ok();
    Ok(Next::RepliedAfter(Duration::from_secs_f64(seconds)))
}

pub fn shutdown(_context: &mut Context<'_>, args: Args<'_>) -> Result<Next, CommandError> {
    let (mut nosave, mut save, mut other, mut abort) = (false, false, false, false);
    for option in args {
        match option.to_ascii_lowercase().as_slice() {
            b"nosave" => nosave = true,
            b"save" => save = true,
            // Both are what happens anyway: nothing is waited for that could be skipped.
            b"now" | b"force" => other = true,
            b"abort" => abort = true,
            _ => return Err(error::SYNTAX),
        }
    }
    if nosave && save || abort && (nosave || save || other) {
        return Err(error::SYNTAX);
    }
    if abort {
        return Err(CommandError::fixed("ERR No shutdown in progress."));
    }
    Ok(Next::Shutdown)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::harness::Harness;

    #[test]
    fn answers_are_those_of_redis() {
        let mut harness = Harness::new();
        harness.script(
            r#"
            > SHUTDOWN foo / < -ERR syntax error
            > SHUTDOWN ABORT NOW / < -ERR syntax error
            > SHUTDOWN SAVE NOSAVE / < -ERR syntax error
            > SHUTDOWN ABORT / < -ERR No shutdown in progress.
            > SHUTDOWN NOSAVE now / < (shutdown)
            > DEBUG SLEEP 0.5 / < OK
            > TIME x / < -ERR wrong number of arguments for 'time' command
            "#,
        );
        for line in ["LOLWUT", "LOLWUT version", "LOLWUT VERSION 5 1 1"] {
            assert!(harness.run(line).ends_with("\\nRedis ver. 7.0.15\\n\""), "{line}");
        }
        assert_eq!(harness.run("LOLWUT version x"), "-ERR value is not an integer or out of range");
        assert!(harness.run("TIME").starts_with("[\""));
    }

    #[test]
    fn debug_sleep_takes_any_number() {
        let mut harness = Harness::new();
        for (text, seconds) in [("0.5", 0.5), ("-1", 0.0), ("x", 0.0), ("nan", 0.0), ("inf", SLEEP_SECONDS_MAX)] {
            harness.run(&format!("DEBUG SLEEP {text}"));
            assert_eq!(harness.delay, Some(Duration::from_secs_f64(seconds)), "{text}");
        }
    }
}
