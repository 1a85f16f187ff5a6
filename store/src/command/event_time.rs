//! EVENTTIME: the time of a write as its client knows it, read from the arguments and checked against the store's clock.

use crate::shard::context::{Context, EventTime};
use vasto_proto::command::Args;
use vasto_proto::command::args::parse_integer;
use vasto_proto::error::{self, CommandError};

const NS_PER_MS: u64 = 1_000_000;

/// Reads an event time: Unix nanoseconds above 0, not further ahead of the store's clock than `max-clock-skew`. A later one would win
/// over all that others write until then, and would move the shard's time, which plain writes must stay above, just as far.
pub fn read(context: &Context<'_>, text: &[u8]) -> Result<EventTime, CommandError> {
    let given = parse_integer(text).and_then(|ns| u64::try_from(ns).ok()).filter(|ns| *ns > 0);
    let ns = given.ok_or(error::NOT_AN_INTEGER)?;
    let skew_ms = context.limits().max_clock_skew_ms;
    let ahead_ns = ns.saturating_sub(context.now_ns());
    if ahead_ns > skew_ms.saturating_mul(NS_PER_MS) {
        return Err(error::event_time_ahead(ahead_ns.div_ceil(NS_PER_MS), skew_ms));
    }
    Ok(EventTime { ns })
}

/// Takes `EVENTTIME unix-ns` if it is what is left; a syntax error if anything else is.
pub fn take_last(context: &Context<'_>, args: &mut Args<'_>) -> Result<Option<EventTime>, CommandError> {
    if args.is_empty() {
        return Ok(None);
    }
    if !args.option(OPTION) {
        return Err(error::SYNTAX);
    }
    let text = args.bytes()?;
    args.end()?;
    read(context, text).map(Some)
}

/// The option's name.
pub const OPTION: &str = "EVENTTIME";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::script::{Script, text};
    use crate::shard::executor::now_ns;
    use vasto_proto::command::table::StoreCommand;

    /// Each case on keys of its own; run twice, before and after a compaction, which must not change what wins.
    const SCENARIOS: &str = r#"
        SET k v EVENTTIME 100 => OK
        OBJECT EVENTTIME k => (integer) 100
        SET k w EVENTTIME 99 => (nil)
        SET k w EVENTTIME 101 => OK
        DEL k EVENTTIME 100 => (integer) 0
        GET k => "w"
        DEL k EVENTTIME 102 => (integer) 1
        SET k late EVENTTIME 101 => (nil)
        OBJECT EVENTTIME k => (nil)
        UNLINK absent eventtime 50 => (integer) 0
        SET absent v EVENTTIME 49 => (nil)
        SETEX absent 100 v EVENTTIME 50 => (nil)
        EXISTS absent => (integer) 0
        SET gone v PXAT 1 EVENTTIME 200 => OK
        SET gone old EVENTTIME 199 => (nil)
        GET gone => (nil)
        PSETEX short 1 v EVENTTIME 7 => OK
        SET old v EVENTTIME 5 => OK
        EXPIRE old 100 EVENTTIME 4 => (integer) 0
        EXPIRE old 100 EVENTTIME x => (error) ERR value is not an integer or out of range
        EXPIRE old 100 EVENTTIME => (error) ERR Unsupported option EVENTTIME
        TTL old => (integer) -1
        EXPIRE old 100 NX EVENTTIME 6 => (integer) 1
        TTL old => (integer) 100
        OBJECT EVENTTIME old => (integer) 6
        PERSIST old EVENTTIME 5 => (integer) 0
        PERSIST old EVENTTIME 7 => (integer) 1
        PERSIST old EVENTTIME 8 => (integer) 0
        OBJECT EVENTTIME old => (integer) 7
        PEXPIREAT old 1 EVENTTIME 6 => (integer) 0
        EXPIREAT old 1 EVENTTIME 8 => (integer) 1
        SET old v EVENTTIME 8 => (nil)
        EXPIRE old 10 EVENTTIME 9 => (integer) 0
    "#;

    /// What the scenarios leave behind.
    const AFTERWARDS: &str = r#"
        SET k late EVENTTIME 102 => (nil)
        SET absent v EVENTTIME 50 => (nil)
        SET gone old EVENTTIME 199 => (nil)
        SET old v EVENTTIME 8 => (nil)
        MGET k absent gone old => [(nil), (nil), (nil), (nil)]
        SET k new EVENTTIME 103 => OK
        SET absent new EVENTTIME 51 => OK
        SET gone new EVENTTIME 201 => OK
        MGET k absent gone => ["new", "new", "new"]
    "#;

    #[test]
    fn the_event_time_decides_and_dead_rows_count() {
        let mut script = Script::new();
        script.run(SCENARIOS);
        assert_eq!(text(&script.ask(StoreCommand::InternalCompact, &[])), "OK");
        script.run(AFTERWARDS);
    }

    #[test]
    fn options_go_together_with_an_event_time() {
        Script::new().run(
            r#"
            SET k v NX EVENTTIME 10 => OK
            SET k w NX EVENTTIME 11 => (nil)
            SET k w XX GET EVENTTIME 9 => "v"
            GET k => "v"
            SET k w EVENTTIME 12 XX GET => "v"
            SET k x EX 100 EVENTTIME 13 => OK
            SET k y EVENTTIME 14 KEEPTTL => OK
            TTL k => (integer) 100
            SET new v GET EVENTTIME 5 => (nil)
            GET new => "v"
            SET k v EVENTTIME => (error) ERR syntax error
            SET k v EVENTTIME 20 EVENTTIME 21 => (error) ERR syntax error
            SET k v EVENTTIME 0 => (error) ERR value is not an integer or out of range
            SET k v EVENTTIME -1 => (error) ERR value is not an integer or out of range
            SET k v EVENTTIME 9223372036854775808 => (error) ERR value is not an integer or out of range
            SET k v EX 0 EVENTTIME x => (error) ERR invalid expire time in 'set' command
            SETEX k 1 v EVENTTIME x => (error) ERR value is not an integer or out of range
            DEL a b EVENTTIME 5 => (error) ERR EVENTTIME goes with one key; nothing was written
            SET EVENTTIME 1 => OK
            DEL EVENTTIME 5 => (integer) 1
            MSET EVENTTIME 1 a 1 x 1 => OK
            DEL a EVENTTIME x => (integer) 3
            "#,
        );
    }

    #[test]
    fn of_equal_event_times_the_same_write_wins_in_every_order() {
        let writes = ["SET k a EVENTTIME 5", "SET k b EVENTTIME 5", "SET k b PXAT 9999999999999 EVENTTIME 5"];
        let ends: Vec<_> = [[0, 1, 2, 0], [2, 1, 0, 1], [1, 0, 2, 2], [0, 0, 2, 1]]
            .into_iter()
            .map(|order| {
                let mut script = Script::new();
                order.iter().for_each(|write| drop(script.line(writes[*write])));
                (script.line("GET k"), script.line("PEXPIRETIME k"))
            })
            .collect();
        assert!(ends.iter().all(|end| *end == ends[0]), "{ends:?}");
        let mut script = Script::new();
        script.run(
            r#"
            SET k a EVENTTIME 5 => OK
            SET k a EVENTTIME 5 => OK
            DEL k EVENTTIME 5 => (integer) 1
            DEL k EVENTTIME 5 => (integer) 0
            SET k a EVENTTIME 5 => (nil)
            "#,
        );
    }

    #[test]
    fn a_plain_write_wins_over_an_event_time_ahead_of_the_clock() {
        let mut script = Script::new();
        let ahead = |ms: u64| now_ns() + ms * 1_000_000;
        for round in 0..20 {
            let given = ahead(400);
            assert_eq!(script.line(&format!("SET k given EVENTTIME {given}")), "OK");
            assert_eq!(script.line("OBJECT EVENTTIME k"), format!("(integer) {given}"));
            match round % 3 {
                0 => assert_eq!(script.line("SET k plain"), "OK"),
                1 => assert_eq!(script.line("APPEND k x"), "(integer) 6"),
                _ => assert_eq!(script.line("FLUSHDB"), "OK"),
            }
            assert_eq!(script.line(&format!("SET k older EVENTTIME {given}")), "(nil)");
            assert_ne!(script.line("GET k"), "\"older\"");
        }
        let error = script.line(&format!("SET k v EVENTTIME {}", ahead(60_000)));
        let said = error.strip_prefix("(error) ERR the event time is ").unwrap();
        assert!(
            said.ends_with(" ms ahead of the store's clock, max-clock-skew is 500 ms; nothing was written"),
            "{error}"
        );
        assert_eq!(script.line(&format!("DEL k EVENTTIME {}", ahead(60_000)))[..17], error[..17]);
    }

    #[test]
    fn a_plain_deletion_holds_against_older_writes_that_come_later() {
        let mut script = Script::new();
        let before = now_ns();
        script.run(
            r#"
            SET k v => OK
            DEL k => (integer) 1
            DEL absent => (integer) 0
            SET gone v PXAT 1 => OK
            UNLINK gone => (integer) 0
            "#,
        );
        for key in ["k", "absent", "gone"] {
            assert_eq!(script.line(&format!("SET {key} late EVENTTIME {before}")), "(nil)", "{key}");
        }
        script.run("DBSIZE => (integer) 0");
    }

    /// The writes of one batch share the stamps that were drawn for it.
    #[test]
    fn a_plain_write_wins_over_an_event_time_in_its_own_batch() {
        let mut script = Script::new();
        let given = now_ns() + 400_000_000;
        let time = given.to_string();
        let answers = script.batch(&[
            &["set", "other", "drawn first"],
            &["set", "k", "given", "EVENTTIME", &time],
            &["set", "k", "plain"],
            &["set", "k", "given", "EVENTTIME", &time],
            &["get", "k"],
        ]);
        assert_eq!(answers, ["OK", "OK", "OK", "(nil)", "\"plain\""]);
    }
}
