//! What gateways ask of a shard's copies.

use crate::replication::FollowerFigures;
use crate::replication::comparison::Comparison;
use crate::shard::context::{Context, Failure};
use vasto_proto::command::Args;
use vasto_proto::error;
use vasto_proto::topology::Role;

/// Sequence numbers of RocksDB have 56 bits.
fn number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// `_replication`
pub fn figures(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    args.end()?;
    // Every shard that is served has its part by a record.
    let Some(figures) = context.shard().replication() else { return Err(error::NO_KEYSPACE.into()) };
    let era = figures.position.unwrap_or_default().era;
    let mut reply = context.reply();
    reply.array(5);
    reply.bulk(match figures.role {
        Role::Primary => b"primary",
        Role::Replica => b"replica",
    });
    reply.integer(number(era.epoch.0));
    reply.integer(number(era.opened));
    reply.integer(number(figures.sequence));
    reply.array(figures.followers.len());
    for FollowerFigures { store, connected, in_sync, applied, lag } in figures.followers {
        reply.array(5);
        reply.integer(i64::from(store.0));
        reply.integer(i64::from(connected));
        reply.integer(i64::from(in_sync));
        reply.integer(number(applied));
        reply.integer(i64::try_from(lag.as_micros()).unwrap_or(i64::MAX));
    }
    Ok(())
}

/// `_verify`
pub fn verify(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    args.end()?;
    let compared = context.compare_copies();
    let mut reply = context.reply();
    match compared {
        Ok(Comparison { rows, copies, slots_differing, text }) => {
            reply.array(4);
            reply.integer(number(rows));
            reply.integer(i64::try_from(copies).unwrap_or(i64::MAX));
            reply.integer(i64::try_from(slots_differing).unwrap_or(i64::MAX));
            reply.bulk(text.as_bytes());
        }
        Err(reason) => reply.error(&format!("ERR the copies cannot be compared: {reason}")),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::script::{Script, text};
    use vasto_proto::command::table::StoreCommand;

    #[test]
    fn a_shard_with_one_copy_has_none_to_compare() {
        let mut script = Script::new();
        script.line("MSET a 1 b 2 c 3");
        script.line("DEL b");
        let answer = text(&script.ask(StoreCommand::InternalVerify, &[]));
        assert_eq!(answer, r#"[(integer) 2, (integer) 0, (integer) 0, ""]"#);
        assert_eq!(text(&script.ask(StoreCommand::InternalVerify, &[b"x"])), "(error) ERR syntax error");
    }

    #[test]
    fn a_shard_that_nobody_follows_says_how_far_it_is() {
        let mut script = Script::new();
        let sequence = |script: &mut Script| {
            let answer = text(&script.ask(StoreCommand::InternalReplication, &[]));
            let middle = answer.strip_prefix(r#"["primary", (integer) 0, (integer) 0, (integer) "#);
            let sequence = middle.and_then(|rest| rest.strip_suffix(", []]")).and_then(|number| number.parse().ok());
            sequence.unwrap_or_else(|| panic!("{answer}"))
        };
        let before: u64 = sequence(&mut script);
        script.ask(StoreCommand::Set, &[b"a", b"1"]);
        assert!(sequence(&mut script) > before);
        let refused = text(&script.ask(StoreCommand::InternalReplication, &[b"x"]));
        assert_eq!(refused, "(error) ERR syntax error");
    }
}
