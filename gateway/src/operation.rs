//! What is being done with a keyspace as a whole, as clients see it: the map of KEYSPACE STATUS, and a few words for everything else.

use vasto_proto::command::ReplyWriter;
use vasto_proto::id::StoreId;
use vasto_proto::pb;
use vasto_proto::topology::{KeyspaceRecord, MoveStage, MoveStatus, Operation, OperationKind, Phase, ShardRecord};

/// What is known of an operation beside its record.
#[derive(Debug)]
pub enum Progress<'a> {
    /// The master that leads says so.
    Told(&'a pb::OperationStatus),
    /// No master could be asked, for this reason.
    Unknown(&'a str),
}

/// The word for a kind of operation.
pub fn kind_word(kind: OperationKind) -> &'static str {
    match kind {
        OperationKind::Resize { .. } => "resize",
        OperationKind::Replace { .. } => "replace",
    }
}

/// Who gets the copies of a store that is replaced.
fn successor(with: Option<StoreId>) -> String {
    with.map_or_else(|| "the best".to_owned(), |store| store.to_string())
}

/// An operation that goes on, in a few words; empty if there is none.
pub fn summary(record: &KeyspaceRecord) -> String {
    let Some(operation) = record.active_operation() else { return String::new() };
    let what = match operation.kind {
        OperationKind::Resize { from, to } => format!("resize from {from} to {to} shards"),
        OperationKind::Replace { store, with } => format!("replace {store} with {}", successor(with)),
    };
    format!("{what}: {}", operation.phase.word())
}

/// What the operation that goes on means for one shard, in a few words; empty = nothing.
pub fn part_of_shard(record: &KeyspaceRecord, number: usize) -> String {
    let Some(operation) = record.active_operation() else { return String::new() };
    let is_committed = !operation.may_be_aborted();
    match operation.kind {
        OperationKind::Resize { from, to } => {
            let is_new = number >= usize::from(from);
            let vanishes = number >= usize::from(to);
            let words = match (is_committed, from < to) {
                (false, true) if is_new => "gets slots",
                (false, true) => "gives slots",
                (false, false) if vanishes => "gives all its slots",
                (false, false) => "gets slots",
                (true, true) if is_new => "",
                (true, true) => "deletes what it gave",
                (true, false) if vanishes => "has no slots and goes",
                (true, false) => "",
            };
            words.to_owned()
        }
        OperationKind::Replace { store, .. } => {
            let has_copy = |shard: &ShardRecord| shard.copies().any(|copy| copy == store);
            let is_concerned = record.shards.get(number).is_some_and(has_copy);
            if is_concerned { format!("replaces its copy on {store}") } else { String::new() }
        }
    }
}

/// How far the data are that have to be moved, in percent with one decimal, rounded down; `None` if nobody says.
fn percent(operation: &Operation, status: &pb::OperationStatus) -> Option<f64> {
    if matches!(operation.phase, Phase::Committed | Phase::Clean | Phase::Done) {
        return Some(100.0);
    }
    // What is expected is an estimate: more may come.
    let share = |part: u64, whole: u64| (part.min(whole) as f64 * 1000.0 / whole as f64).floor() / 10.0;
    match (status.bytes_expected, status.slots, operation.kind) {
        (1.., _, _) => Some(share(status.bytes_copied, status.bytes_expected)),
        (0, 1.., _) => Some(share(status.slots_copied.into(), status.slots.into())),
        (0, 0, OperationKind::Resize { .. }) => Some(0.0),
        (0, 0, OperationKind::Replace { .. }) => None,
    }
}

/// A move as one line for people.
fn line_of_move(of_shard: &pb::MoveOfShard) -> Option<String> {
    let status = MoveStatus::from_message(of_shard.status.clone()?)?;
    let stage = match status.stage {
        MoveStage::Waits => "waits",
        MoveStage::Copies => "copies",
        MoveStage::Follows => "follows",
        MoveStage::Drained { .. } => "drained",
    };
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    let mut line = format!(
        "shard {} on {} from shard {}: {stage}, {} of {} slots, {} rows, {:.1} of {:.1} MB, {} keys and {} ms behind",
        of_shard.target,
        StoreId(of_shard.store_id),
        status.source,
        status.slots_copied,
        status.slots,
        status.rows_copied,
        megabytes(status.bytes_copied),
        megabytes(status.bytes_expected),
        status.behind_keys,
        status.behind_ms,
    );
    if status.attempts > 1 {
        line.push_str(&format!(", begun {} times", status.attempts));
    }
    if !status.trouble.is_empty() {
        line.push_str(&format!(", {}", status.trouble));
    }
    Some(line)
}

/// Writes a map field by field.
struct Fields<'a, 'b> {
    reply: &'a mut ReplyWriter<'b>,
}

impl Fields<'_, '_> {
    fn text(&mut self, name: &str, text: &str) {
        self.reply.bulk(name.as_bytes());
        self.reply.bulk(text.as_bytes());
    }

    /// Null if it is not known.
    fn number(&mut self, name: &str, number: Option<u64>) {
        self.reply.bulk(name.as_bytes());
        match number {
            Some(number) => self.reply.integer(i64::try_from(number).unwrap_or(i64::MAX)),
            None => self.reply.null(),
        }
    }
}

const STATUS_FIELDS: usize = 20;

/// The map of KEYSPACE STATUS. Of a keyspace without an operation it has three fields.
pub fn write_status(reply: &mut ReplyWriter<'_>, record: &KeyspaceRecord, progress: &Progress<'_>) {
    let Some(operation) = &record.operation else {
        reply.map(3);
        let mut fields = Fields { reply };
        fields.text("keyspace", &record.name);
        fields.number("operation", None);
        fields.text("phase", "none");
        return;
    };
    reply.map(STATUS_FIELDS);
    let mut fields = Fields { reply };
    fields.text("keyspace", &record.name);
    fields.number("operation", Some(operation.id));
    fields.text("kind", kind_word(operation.kind));
    match operation.kind {
        OperationKind::Resize { from, to } => {
            fields.number("from", Some(from.into()));
            fields.number("to", Some(to.into()));
        }
        OperationKind::Replace { store, with } => {
            fields.text("from", &store.to_string());
            fields.text("to", &successor(with));
        }
    }
    fields.text("phase", operation.phase.word());
    let status = match progress {
        Progress::Told(status) => Some(*status),
        Progress::Unknown(_) => None,
    };
    let known = |figure: fn(&pb::OperationStatus) -> u64| status.map(figure);
    fields.reply.bulk(b"percent");
    match status.and_then(|status| percent(operation, status)) {
        Some(percent) => fields.reply.double(percent),
        None => fields.reply.null(),
    }
    fields.number("slots", known(|status| status.slots.into()));
    fields.number("slots_copied", known(|status| status.slots_copied.into()));
    fields.number("rows", known(|status| status.rows_copied));
    fields.number("bytes", known(|status| status.bytes_copied));
    fields.number("bytes_expected", known(|status| status.bytes_expected));
    // Bytes per second.
    fields.number("rate", known(|status| status.bytes_per_second));
    fields.number("behind_keys", known(|status| status.behind_keys));
    fields.number("behind_ms", known(|status| status.behind_ms));
    // Seconds; what is left is rounded up, so that 0 means that nothing is.
    fields.number("elapsed", known(|status| status.elapsed_ms / 1000));
    let remaining_ms = known(|status| status.remaining_ms).filter(|left| *left != 0);
    fields.number("remaining", remaining_ms.map(|left| left.div_ceil(1000)));
    let waits_for = match progress {
        Progress::Told(status) => &status.waits_for,
        Progress::Unknown(_) if !operation.is_active() => "",
        Progress::Unknown(reason) => *reason,
    };
    fields.text("waits_for", waits_for);
    fields.text("reason", &operation.reason);
    let lines: Vec<String> = status.into_iter().flat_map(|status| &status.moves).filter_map(line_of_move).collect();
    fields.reply.bulk(b"moves");
    fields.reply.array(lines.len());
    lines.iter().for_each(|line| fields.reply.bulk(line.as_bytes()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::show;
    use vasto_proto::id::KeyspaceId;

    fn record(shards: u32) -> KeyspaceRecord {
        let stores: Vec<StoreId> = (1..=shards).map(StoreId).collect();
        KeyspaceRecord::new(KeyspaceId(4), "four", &stores).expect("valid")
    }

    fn shown(record: &KeyspaceRecord, progress: &Progress<'_>) -> String {
        let mut reply = Vec::new();
        write_status(&mut ReplyWriter::new(&mut reply), record, progress);
        show(&reply)
    }

    #[test]
    fn a_keyspace_without_an_operation_says_so() {
        let expected = r#"{"keyspace": "four", "operation": null, "phase": "none"}"#;
        let status = pb::OperationStatus::default();
        assert_eq!(shown(&record(1), &Progress::Told(&status)), expected);
        assert_eq!(shown(&record(1), &Progress::Unknown("nobody leads")), expected);
    }

    #[test]
    fn a_status_shows_what_the_master_says_or_why_it_says_nothing() {
        let record = record(1).begin_resize(2, vec![StoreId(7)]).expect("possible");
        let moving = pb::MoveStatus {
            source: 0,
            operation: 2,
            stage: pb::MoveStage::Copies.into(),
            slots: 8000,
            slots_copied: 100,
            rows_copied: 12,
            bytes_copied: 1_500_000,
            bytes_expected: 3_000_000,
            behind_keys: 4,
            behind_ms: 5,
            attempts: 2,
            trouble: "shard 4-0 has no primary".to_owned(),
            ..pb::MoveStatus::default()
        };
        let status = pb::OperationStatus {
            waits_for: "rows".to_owned(),
            elapsed_ms: 61_900,
            slots: 8000,
            slots_copied: 100,
            rows_copied: 12,
            bytes_copied: 1_500_000,
            bytes_expected: 3_000_000,
            bytes_per_second: 64,
            behind_keys: 4,
            behind_ms: 5,
            remaining_ms: 1,
            moves: vec![pb::MoveOfShard { target: 1, store_id: 7, status: Some(moving) }],
            ..pb::OperationStatus::default()
        };
        assert_eq!(
            shown(&record, &Progress::Told(&status)),
            r#"{"keyspace": "four", "operation": 2, "kind": "resize", "from": 1, "to": 2, "phase": "copy", "percent": 50.0, "slots": 8000, "slots_copied": 100, "rows": 12, "bytes": 1500000, "bytes_expected": 3000000, "rate": 64, "behind_keys": 4, "behind_ms": 5, "elapsed": 61, "remaining": 1, "waits_for": "rows", "reason": "", "moves": ["shard 1 on 00000007 from shard 0: copies, 100 of 8000 slots, 12 rows, 1.5 of 3.0 MB, 4 keys and 5 ms behind, begun 2 times, shard 4-0 has no primary"]}"#
        );
        assert_eq!(
            shown(&record, &Progress::Unknown("nobody leads")),
            r#"{"keyspace": "four", "operation": 2, "kind": "resize", "from": 1, "to": 2, "phase": "copy", "percent": null, "slots": null, "slots_copied": null, "rows": null, "bytes": null, "bytes_expected": null, "rate": null, "behind_keys": null, "behind_ms": null, "elapsed": null, "remaining": null, "waits_for": "nobody leads", "reason": "", "moves": []}"#
        );
        let aborted = record.abort("the disk is full").expect("possible");
        let text = shown(&aborted, &Progress::Unknown("nobody leads"));
        assert!(text.contains(r#""phase": "aborted""#), "{text}");
        assert!(text.contains(r#""waits_for": "", "reason": "the disk is full""#), "{text}");
    }

    #[test]
    fn the_share_is_that_of_bytes_or_else_of_slots_and_whole_only_at_the_end() {
        let copying = record(1).begin_resize(2, vec![StoreId(7)]).expect("possible");
        let share = |record: &KeyspaceRecord, bytes: (u64, u64), slots: (u32, u32)| {
            let status = pb::OperationStatus {
                bytes_copied: bytes.0,
                bytes_expected: bytes.1,
                slots_copied: slots.0,
                slots: slots.1,
                ..pb::OperationStatus::default()
            };
            percent(record.operation.as_ref().expect("there is one"), &status)
        };
        assert_eq!(share(&copying, (0, 0), (0, 0)), Some(0.0));
        assert_eq!(share(&copying, (0, 0), (1, 3)), Some(33.3));
        assert_eq!(share(&copying, (99_999, 100_000), (0, 3)), Some(99.9));
        assert_eq!(share(&copying, (200, 100), (0, 3)), Some(100.0));
        let committed = copying.fence().and_then(|fenced| fenced.commit()).expect("possible");
        assert_eq!(share(&committed, (0, 0), (0, 0)), Some(100.0));
        let replacing = record(1).begin_replace(StoreId(1), None).expect("possible");
        assert_eq!(share(&replacing, (0, 0), (0, 0)), None);
        assert_eq!(share(&replacing, (0, 0), (1, 2)), Some(50.0));
    }

    #[test]
    fn an_operation_is_told_in_a_few_words() {
        let (one, three) = (record(1), record(3));
        assert_eq!(summary(&one), "");
        let parts = |record: &KeyspaceRecord| -> Vec<String> {
            (0..record.shards.len()).map(|number| part_of_shard(record, number)).collect()
        };
        let growing = one.begin_resize(2, vec![StoreId(7)]).expect("possible");
        assert_eq!(summary(&growing), "resize from 1 to 2 shards: copy");
        assert_eq!(parts(&growing), ["gives slots", "gets slots"]);
        let grown = growing.fence().and_then(|fenced| fenced.commit()).expect("possible");
        assert_eq!(parts(&grown), ["deletes what it gave", ""]);
        let done = grown.clean().and_then(|cleaning| cleaning.finish()).expect("possible");
        assert_eq!((summary(&done), parts(&done)), (String::new(), vec![String::new(); 2]));
        let shrinking = three.begin_resize(2, Vec::new()).expect("possible");
        assert_eq!(parts(&shrinking), ["gets slots", "gets slots", "gives all its slots"]);
        let shrunk = shrinking.fence().and_then(|fenced| fenced.commit()).expect("possible");
        assert_eq!(summary(&shrunk), "resize from 3 to 2 shards: committed");
        assert_eq!(parts(&shrunk), ["", "", "has no slots and goes"]);
        let replacing = three.begin_replace(StoreId(2), Some(StoreId(9))).expect("possible");
        assert_eq!(summary(&replacing), "replace 00000002 with 00000009: copy");
        assert_eq!(parts(&replacing), ["", "replaces its copy on 00000002", ""]);
        let replacing = three.begin_replace(StoreId(2), None).expect("possible");
        assert_eq!(summary(&replacing), "replace 00000002 with the best: copy");
    }
}
