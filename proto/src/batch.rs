//! The packed batch: many operations, or many answers, in one `bytes` field of one message.
//!
//! A batch of operations is a sequence of (all integers little endian)
//!
//! ```text
//! u32 length of what follows    u32 operation id      u32 connection     u32 keyspace
//! u16 shard                     u16 command           u64 shard epoch    u32 flags
//! u32 argument count, then per argument: u32 length, bytes           (the command's own name is not among them)
//! ```
//!
//! and a batch of answers a sequence of
//!
//! ```text
//! u32 length of what follows    u32 operation id      u8 outcome         body
//! ```
//!
//! Decoding copies nothing: views are slices of the message.

use crate::id::{Epoch, KeyspaceId, ShardId, ShardKey};
use thiserror::Error;

/// Bytes of an operation before its arguments, the length field included.
pub const OPERATION_HEAD_BYTES: usize = 4 + OPERATION_FIXED_BYTES;
const OPERATION_FIXED_BYTES: usize = 4 + 4 + 4 + 2 + 2 + 8 + 4 + 4;
/// Bytes of an answer before its body, the length field included.
pub const ANSWER_HEAD_BYTES: usize = 4 + ANSWER_FIXED_BYTES;
const ANSWER_FIXED_BYTES: usize = 4 + 1;

/// Operation flag: the gateway holds a permit for a value above [`crate::net::LARGE_VALUE_BYTES`].
pub const FLAG_LARGE_PERMIT: u32 = 1;
/// Operation flag: the gateway knows that earlier operations of this connection on this shard were refused, has their answers, and starts
/// again from here. After a refusal a store refuses all operations of the connection on the shard until it sees this flag, so that
/// operations already under way behind the refused one never overtake it.
pub const FLAG_AFTER_REFUSAL: u32 = 2;
/// Operation flag: the client takes an answer of a replica, which may be stale (READONLY).
pub const FLAG_FROM_REPLICA: u32 = 4;
/// The upper half of an operation's flags: by how many shards the gateway has assigned slots. What covers slots instead of naming keys (SCAN,
/// DBSIZE, FLUSHDB …) is refused where another number holds. 0 = not said.
pub const SHARD_COUNT_SHIFT: u32 = 16;

/// Bytes that are no batch.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("malformed batch at byte {offset}")]
pub struct BatchError {
    pub offset: usize,
}

/// What stands before an operation's arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OperationHead {
    /// Chosen by the gateway, unique among its operations in flight on one stream.
    pub id: u32,
    /// The client connection, unique on one stream: operations of one connection on one shard run in order.
    pub connection: u32,
    pub target: ShardKey,
    /// The epoch of the shard as the gateway knows it; the store's gate checks it.
    pub epoch: Epoch,
    /// Index into the command table.
    pub command: u16,
    pub flags: u32,
}

impl OperationHead {
    /// By how many shards the gateway has assigned slots; `None`: it has not said.
    pub fn shard_count(&self) -> Option<u16> {
        Some((self.flags >> SHARD_COUNT_SHIFT) as u16).filter(|count| *count != 0)
    }
}

/// Flags that say by how many shards slots were assigned.
pub fn with_shard_count(flags: u32, shard_count: u16) -> u32 {
    flags & ((1 << SHARD_COUNT_SHIFT) - 1) | u32::from(shard_count) << SHARD_COUNT_SHIFT
}

/// Appends one operation; `arguments` must yield exactly what is sent.
pub fn write_operation<'a>(out: &mut Vec<u8>, head: &OperationHead, arguments: impl IntoIterator<Item = &'a [u8]>) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&head.id.to_le_bytes());
    out.extend_from_slice(&head.connection.to_le_bytes());
    out.extend_from_slice(&head.target.keyspace.0.to_le_bytes());
    out.extend_from_slice(&head.target.shard.0.to_le_bytes());
    out.extend_from_slice(&head.command.to_le_bytes());
    out.extend_from_slice(&head.epoch.0.to_le_bytes());
    out.extend_from_slice(&head.flags.to_le_bytes());
    let count_at = out.len();
    out.extend_from_slice(&[0; 4]);
    let mut count = 0u32;
    for argument in arguments {
        write_bytes(out, argument);
        count += 1;
    }
    out[count_at..count_at + 4].copy_from_slice(&count.to_le_bytes());
    close_length(out, start);
}

/// Appends a length and the bytes.
pub fn write_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    let length = u32::try_from(bytes.len()).expect("an argument is at most proto-max-bulk-len (512 MB)");
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(bytes);
}

fn close_length(out: &mut [u8], start: usize) {
    let length = u32::try_from(out.len() - start - 4).expect("one operation or answer stays below 4 GiB");
    out[start..start + 4].copy_from_slice(&length.to_le_bytes());
}

/// One operation, borrowed from its batch.
#[derive(Clone, Copy, Debug)]
pub struct Operation<'a> {
    pub head: OperationHead,
    pub arguments: Arguments<'a>,
}

/// The arguments of one operation, without the command's name. A cheap cursor: copying it starts a second walk.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a> {
    rest: &'a [u8],
    left: u32,
}

impl<'a> Arguments<'a> {
    /// Arguments left.
    pub fn len(&self) -> usize {
        self.left as usize
    }

    pub fn is_empty(&self) -> bool {
        self.left == 0
    }

    /// Packed arguments without count, as they lie behind an operation's head; validated.
    pub fn parse(bytes: &'a [u8], count: u32) -> Result<Self, BatchError> {
        let all = Self { rest: bytes, left: count };
        let mut walk = all;
        for _ in 0..count {
            if walk.next().is_none() {
                return Err(BatchError { offset: bytes.len() - walk.rest.len() });
            }
        }
        if walk.rest.is_empty() { Ok(all) } else { Err(BatchError { offset: bytes.len() - walk.rest.len() }) }
    }

    /// The packed bytes of what is left.
    pub fn packed(&self) -> &'a [u8] {
        self.rest
    }
}

impl<'a> Iterator for Arguments<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        if self.left == 0 {
            return None;
        }
        let (length, rest) = self.rest.split_first_chunk::<4>()?;
        let (argument, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        self.rest = rest;
        self.left -= 1;
        Some(argument)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.len(), Some(self.len()))
    }
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(bytes[offset..offset + 2].try_into().expect("two bytes"))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("eight bytes"))
}

/// Walks the operations of a batch; ends after the first malformed one.
#[derive(Clone, Debug)]
pub struct Operations<'a> {
    batch: &'a [u8],
    offset: usize,
}

impl<'a> Operations<'a> {
    pub fn new(batch: &'a [u8]) -> Self {
        Self { batch, offset: 0 }
    }

    /// Where the next operation starts in the batch.
    pub fn offset(&self) -> usize {
        self.offset
    }
}

impl<'a> Iterator for Operations<'a> {
    type Item = Result<Operation<'a>, BatchError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.offset == self.batch.len() {
            return None;
        }
        let at = self.offset;
        let error = BatchError { offset: at };
        let Some(body) = section(self.batch, at) else {
            self.offset = self.batch.len();
            return Some(Err(error));
        };
        self.offset = at + 4 + body.len();
        if body.len() < OPERATION_FIXED_BYTES {
            self.offset = self.batch.len();
            return Some(Err(error));
        }
        let head = OperationHead {
            id: u32_at(body, 0),
            connection: u32_at(body, 4),
            target: ShardKey { keyspace: KeyspaceId(u32_at(body, 8)), shard: ShardId(u16_at(body, 12)) },
            command: u16_at(body, 14),
            epoch: Epoch(u64_at(body, 16)),
            flags: u32_at(body, 24),
        };
        match Arguments::parse(&body[OPERATION_FIXED_BYTES..], u32_at(body, 28)) {
            Ok(arguments) => Some(Ok(Operation { head, arguments })),
            Err(_) => {
                self.offset = self.batch.len();
                Some(Err(error))
            }
        }
    }
}

/// The bytes behind the length field at `offset`, if they are all there.
fn section(bytes: &[u8], offset: usize) -> Option<&[u8]> {
    let length = u32::from_le_bytes(*bytes.get(offset..)?.first_chunk::<4>()?) as usize;
    bytes.get(offset + 4..)?.get(..length)
}

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Outcome {
    /// The body is a packed reply (which may be an error of the command).
    Reply = 0,
    /// Nothing was executed: the store has no such shard (body: text).
    NotHere = 1,
    /// Nothing was executed: the shard's epoch is another (body: text).
    WrongEpoch = 2,
    /// Nothing was executed: the shard opens, is fenced or closed; the same store may serve it soon (body: text).
    NotServing = 3,
    /// Nothing was executed: the value is above the large-value threshold and the operation has no permit (body empty).
    NeedsLargePermit = 4,
    /// Whether it was executed is unknown (body: text).
    Unknown = 5,
    /// Nothing was executed: fewer replicas than the keyspace's `min-replicas` follow (body: text); the same store may take it soon.
    NoReplicas = 6,
}

impl Outcome {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0 => Self::Reply,
            1 => Self::NotHere,
            2 => Self::WrongEpoch,
            3 => Self::NotServing,
            4 => Self::NeedsLargePermit,
            5 => Self::Unknown,
            6 => Self::NoReplicas,
            _ => return None,
        })
    }
}

/// Appends one answer with the given body.
pub fn write_answer(out: &mut Vec<u8>, id: u32, outcome: Outcome, body: &[u8]) {
    let mark = begin_answer(out, id, outcome);
    out.extend_from_slice(body);
    end_answer(out, mark);
}

/// Where an answer that is being written starts.
#[derive(Debug)]
#[must_use = "an answer without its end is malformed"]
pub struct AnswerMark(usize);

/// Starts an answer whose body is written straight into `out`; finish it with [`end_answer`].
pub fn begin_answer(out: &mut Vec<u8>, id: u32, outcome: Outcome) -> AnswerMark {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&id.to_le_bytes());
    out.push(outcome as u8);
    AnswerMark(start)
}

/// Takes back what was written since [`begin_answer`], the answer's head included.
pub fn cancel_answer(out: &mut Vec<u8>, mark: AnswerMark) {
    out.truncate(mark.0);
}

pub fn end_answer(out: &mut [u8], mark: AnswerMark) {
    close_length(out, mark.0);
}

/// One answer, borrowed from its batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer<'a> {
    pub id: u32,
    pub outcome: Outcome,
    pub body: &'a [u8],
}

/// Walks the answers of a batch; ends after the first malformed one.
#[derive(Clone, Debug)]
pub struct Answers<'a> {
    batch: &'a [u8],
    offset: usize,
}

impl<'a> Answers<'a> {
    pub fn new(batch: &'a [u8]) -> Self {
        Self { batch, offset: 0 }
    }
}

impl<'a> Iterator for Answers<'a> {
    type Item = Result<Answer<'a>, BatchError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.offset == self.batch.len() {
            return None;
        }
        let at = self.offset;
        let parsed = section(self.batch, at).and_then(|body| {
            let (fixed, rest) = body.split_at_checked(ANSWER_FIXED_BYTES)?;
            self.offset = at + 4 + body.len();
            Some(Answer { id: u32_at(fixed, 0), outcome: Outcome::from_byte(fixed[4])?, body: rest })
        });
        if parsed.is_none() {
            self.offset = self.batch.len();
        }
        Some(parsed.ok_or(BatchError { offset: at }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn head(id: u32) -> OperationHead {
        OperationHead {
            id,
            connection: id ^ 7,
            target: ShardKey { keyspace: KeyspaceId(3), shard: ShardId(5) },
            epoch: Epoch(u64::from(id) << 20),
            command: 9,
            flags: FLAG_LARGE_PERMIT,
        }
    }

    proptest! {
        #[test]
        fn operations_round_trip(operations in prop::collection::vec((any::<u32>(), prop::collection::vec(any::<Vec<u8>>(), 0..5)), 0..8)) {
            let mut batch = Vec::new();
            for (id, arguments) in &operations {
                write_operation(&mut batch, &head(*id), arguments.iter().map(Vec::as_slice));
            }
            let read: Vec<(u32, Vec<Vec<u8>>)> = Operations::new(&batch)
                .map(|operation| {
                    let operation = operation.unwrap();
                    assert_eq!(operation.head, head(operation.head.id));
                    (operation.head.id, operation.arguments.map(<[u8]>::to_vec).collect())
                })
                .collect();
            prop_assert_eq!(read, operations);
        }

        #[test]
        fn bytes_from_the_network_never_panic(bytes in any::<Vec<u8>>()) {
            for operation in Operations::new(&bytes).flatten() {
                let _ = operation.arguments.count();
            }
            let _ = Answers::new(&bytes).count();
        }

        #[test]
        fn answers_round_trip(answers in prop::collection::vec((any::<u32>(), any::<Vec<u8>>()), 0..8)) {
            let mut batch = Vec::new();
            for (id, body) in &answers {
                write_answer(&mut batch, *id, Outcome::Reply, body);
            }
            let read: Vec<(u32, Vec<u8>)> = Answers::new(&batch).map(|answer| answer.map(|answer| (answer.id, answer.body.to_vec())).unwrap()).collect();
            prop_assert_eq!(read, answers);
        }
    }

    #[test]
    fn a_cut_batch_is_an_error_not_a_shorter_batch() {
        let mut batch = Vec::new();
        write_operation(&mut batch, &head(1), [b"key".as_slice()]);
        for cut in 1..batch.len() {
            assert!(Operations::new(&batch[..cut]).any(|operation| operation.is_err()), "cut at {cut}");
        }
    }
}
