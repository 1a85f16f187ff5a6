//! The rows of the first round, as they come to a target: those of a group go into a file while they come, to be taken in at its end.

use super::moved_rows::{MovedRowsError, Unpacker, above_flush};
use super::target::TakeError;
use crate::engine::moved_file::{MovedFile, MovedFileWriter, MovedFiles};
use crate::replication::Replicator;
use crate::shard::Shard;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use vasto_proto::pb::MovedRows;
use vasto_proto::topology::SlotSet;

/// Messages that wait to be written: enough to go on while the disk takes its time.
const MESSAGES_MAX: usize = 4;

/// Reads rows that come, from message to message.
#[derive(Clone, Debug, Default)]
pub struct Reader {
    unpacker: Unpacker,
    /// If they come in the order of their keys.
    last_key: Option<Vec<u8>>,
    /// The largest event time of all rows so far.
    pub largest_ns: u64,
}

impl Reader {
    pub fn in_order() -> Self {
        Self { last_key: Some(Vec::new()), ..Self::default() }
    }

    /// Hands over the rows that are whole with this message, above the flush of the shard they come to: physical key and row.
    pub fn read<E: From<MovedRowsError>>(
        &mut self,
        message: &MovedRows,
        slots: &SlotSet,
        flush_ns: u64,
        mut each: impl FnMut(&[u8], &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let Self { unpacker, last_key, largest_ns } = self;
        unpacker.take(message, slots, |key, row| {
            if let Some(last_key) = last_key {
                if key <= last_key.as_slice() {
                    return Err(MovedRowsError::Order.into());
                }
                last_key.clear();
                last_key.extend_from_slice(key);
            }
            let (row, stamp_ns) = above_flush(row, flush_ns)?;
            *largest_ns = stamp_ns.max(*largest_ns);
            each(key, &row)
        })
    }

    /// Whether a row is yet to be completed.
    pub fn is_in_a_row(&self) -> bool {
        self.unpacker.is_in_a_row()
    }
}

/// A group that goes into a file.
pub struct Group {
    /// As they came: a file that cannot be taken in is written in another way.
    messages: Vec<Arc<MovedRows>>,
    to_file: mpsc::Sender<Arc<MovedRows>>,
    written: JoinHandle<Result<Written, TakeError>>,
}

pub struct Written {
    pub messages: Vec<Arc<MovedRows>>,
    /// None if the group has no rows.
    pub file: Option<MovedFile>,
    /// Behind the group.
    pub reader: Reader,
}

impl Group {
    /// `reader` is before the group; what is dropped when the file is written, or given up, is `until_written`.
    pub fn begin<T: Send + 'static>(
        replicator: &Replicator,
        shard: &Shard,
        mut reader: Reader,
        slots: SlotSet,
        flush_ns: u64,
        until_written: T,
    ) -> Self {
        let files = shard.database.moved_files();
        let (to_file, mut messages) = mpsc::channel::<Arc<MovedRows>>(MESSAGES_MAX);
        let written = replicator.spawn_aside(move || {
            let mut writer = None;
            let written = std::iter::from_fn(|| messages.blocking_recv()).try_for_each(|message| {
                reader.read(&message, &slots, flush_ns, |key, row| put(&files, &mut writer, key, row))
            });
            let file = written.and_then(|()| Ok(writer.map(MovedFileWriter::finish).transpose()?));
            drop(until_written);
            Ok(Written { messages: Vec::new(), file: file?, reader })
        });
        Self { messages: Vec::new(), to_file, written }
    }

    pub async fn add(&mut self, message: MovedRows) -> Result<(), String> {
        let message = Arc::new(message);
        self.messages.push(Arc::clone(&message));
        if self.to_file.send(message).await.is_ok() {
            return Ok(());
        }
        match result(&mut self.written).await {
            Err(reason) => Err(reason),
            Ok(_) => Err("a file of rows ended before its group".to_owned()),
        }
    }

    /// Waits until the file is written.
    pub async fn end(self) -> Result<Written, String> {
        let Self { messages, to_file, mut written } = self;
        drop(to_file);
        Ok(Written { messages, ..result(&mut written).await? })
    }
}

async fn result(written: &mut JoinHandle<Result<Written, TakeError>>) -> Result<Written, String> {
    let written = written.await.map_err(|error| format!("writing a file of rows panicked: {error}"))?;
    written.map_err(|error| error.to_string())
}

fn put<'f>(
    files: &'f MovedFiles,
    writer: &mut Option<MovedFileWriter<'f>>,
    key: &[u8],
    row: &[u8],
) -> Result<(), TakeError> {
    let writer = match writer {
        Some(writer) => writer,
        none => none.insert(files.begin()?),
    };
    Ok(writer.put(key, row)?)
}
