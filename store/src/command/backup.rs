//! Commands between gateways and stores on backups: they are sent to one shard and concern its whole store.

use crate::backup::BackupError;
use crate::shard::context::{Context, Failure};
use vasto_proto::command::Args;
use vasto_proto::error::{self, CommandError};

fn refusal(error: BackupError) -> CommandError {
    match error {
        BackupError::Busy => error::SAVE_IN_PROGRESS,
        error @ (BackupError::Name(_)
        | BackupError::NotServed { .. }
        | BackupError::Checkpoint { .. }
        | BackupError::Io { .. }
        | BackupError::Data(_)
        | BackupError::Operation(_)
        | BackupError::Stopping) => format!("ERR {error}").into(),
    }
}

/// `_save name start|wait`
pub fn save(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    let name = String::from_utf8_lossy(args.bytes()?);
    let saved = if args.option("start") {
        context.start_backup(&name)
    } else if args.option("wait") {
        context.make_backup(&name)
    } else {
        return Err(error::SYNTAX.into());
    };
    saved.map_err(refusal)?;
    context.reply().ok();
    Ok(())
}

/// `_saves`
pub fn saves(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    args.end()?;
    let status = context.backup_status();
    let fields = [
        ("in_progress", i64::from(status.is_running)),
        ("last_done", i64::try_from(status.last_done_s).unwrap_or(i64::MAX)),
        ("failed", i64::from(status.has_failed)),
    ];
    let mut reply = context.reply();
    reply.map(fields.len());
    for (name, value) in fields {
        reply.bulk(name.as_bytes());
        reply.integer(value);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::script::{Script, text};
    use vasto_proto::command::table::StoreCommand;

    #[test]
    fn a_store_is_backed_up_at_the_word_of_one_shard() {
        let mut script = Script::new();
        let saves = |script: &mut Script| text(&script.ask(StoreCommand::InternalSaves, &[]));
        let none = r#"{"in_progress": (integer) 0, "last_done": (integer) 0, "failed": (integer) 0}"#;
        assert_eq!(saves(&mut script), none);
        let mut save =
            |name: &str, mode: &str| text(&script.ask(StoreCommand::InternalSave, &[name.as_bytes(), mode.as_bytes()]));
        assert_eq!(save("a", "wait"), "OK");
        assert_eq!(save("a", "wait"), "(error) ERR \"a\" is no name for a backup, or taken already");
        assert_eq!(save("b", "whenever"), "(error) ERR syntax error");
        assert_eq!(save("c", "start"), "OK");
        while saves(&mut script).contains("\"in_progress\": (integer) 1") {
            std::thread::yield_now();
        }
        assert!(saves(&mut script).ends_with("\"failed\": (integer) 0}"));
    }
}
