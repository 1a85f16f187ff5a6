//! What one command sees of its shard: rows through the overlay of its batch's own writes.

use super::Shard;
use super::rows::{CellIndex, Rows, State};
use super::stripes::StripeGuard;
use super::view::ShardView;
use crate::config::Limits;
use crate::engine::{EngineError, Tier};
use crate::metrics::Counters;
use bytes::Bytes;
use std::ops::Range;
use vasto_proto::batch::Outcome;
use vasto_proto::command::ReplyWriter;
use vasto_proto::error::CommandError;
use vasto_proto::net::LARGE_VALUE_BYTES;
use vasto_proto::row::{Header, RowKind, Stamp};

/// A row that is alive: its header and its payload.
#[derive(Clone, Debug)]
pub struct Row {
    pub header: Header,
    pub value: Bytes,
}

/// What a command writes to a key.
#[derive(Clone, Copy, Debug)]
pub struct Put<'v> {
    pub value: &'v [u8],
    /// Unix time in milliseconds; 0 = never.
    pub expires_at_ms: u64,
    pub changed_in_place: bool,
}

/// Why a command wrote nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The client's mistake: an error reply.
    Error(CommandError),
    /// Nothing (more) of the operation is applied: a definite refusal or an unknown outcome, with its text.
    Refused(Outcome, String),
    /// What the command needs is not in memory, or the write would stall: the executor runs the whole operation again in the
    /// blocking lane. Handlers pass it on as it is (`_exec` too: never as the error of one inner command).
    Diverted,
}

impl From<CommandError> for Failure {
    fn from(error: CommandError) -> Self {
        Self::Error(error)
    }
}

/// One command's view of its shard. All keys that `command::keys_of` named are locked and, unless the command is blind, loaded;
/// other keys cannot be read or written.
///
/// The cheapest way to answer with a value is [`Context::reply_value`] (no copy but the one into the answer), to look at a
/// row [`Context::peek`] (no copy at all); [`Context::row`] copies the value out so that it outlives the borrow.
pub struct Context<'a> {
    pub(super) rows: &'a mut Rows,
    pub(super) stripes: &'a [StripeGuard<'a>],
    pub(super) shard: &'a Shard,
    /// The packed operations that the cells' keys point into.
    pub(super) batch: &'a [u8],
    pub(super) answers: &'a mut Vec<u8>,
    pub(super) limits: &'a Limits,
    pub(super) counters: &'a Counters,
    pub(super) tier: Tier,
    pub(super) has_large_permit: bool,
    pub(super) now_ns: u64,
    pub(super) now_ms: u64,
    /// This operation's part of `rows.operation_cells`.
    pub(super) cells: Range<usize>,
    /// Where in it the last key was found: handlers ask for their keys in order.
    pub(super) hint: usize,
}

impl<'a> Context<'a> {
    /// Unix time in milliseconds, read once per batch.
    pub fn now_ms(&self) -> u64 {
        self.now_ms
    }

    /// Bytes that the store's row cache holds, as of the last second.
    pub fn row_cache_bytes(&self) -> u64 {
        self.counters.row_cache_bytes()
    }

    /// Refuses to make a value above the large-value threshold without a permit; before anything is written.
    pub fn admit_value(&self, bytes: usize) -> Result<(), Failure> {
        if bytes > LARGE_VALUE_BYTES && !self.has_large_permit {
            return Err(Failure::Refused(Outcome::NeedsLargePermit, String::new()));
        }
        Ok(())
    }

    pub fn limits(&self) -> &'a Limits {
        self.limits
    }

    /// Where the reply goes.
    pub fn reply(&mut self) -> ReplyWriter<'_> {
        ReplyWriter::new(self.answers)
    }

    /// The row of a key if it is alive: not deleted, not flushed, not expired. The value is copied; see [`Context::peek`].
    pub fn row(&mut self, key: &[u8]) -> Result<Option<Row>, Failure> {
        let row = self.peek(key)?;
        Ok(row.map(|(header, value)| Row { header, value: Bytes::copy_from_slice(value) }))
    }

    /// The row of a key if it is alive, where it lies.
    pub fn peek(&mut self, key: &[u8]) -> Result<Option<(Header, &[u8])>, Failure> {
        let cell = self.load(key)?;
        let flush_ns = self.flush_ns();
        let now_ms = self.now_ms;
        let Some((header, value)) = self.decode(cell)? else { return Ok(None) };
        Ok((header.is_alive(now_ms) && header.stamp.ns > flush_ns).then_some((header, value)))
    }

    /// Replies with the value of a key as a bulk string, or with null.
    pub fn reply_value(&mut self, key: &[u8]) -> Result<(), Failure> {
        let cell = self.load(key)?;
        let flush_ns = self.flush_ns();
        let row = Self::raw(self.rows, self.stripes, cell);
        let mut reply = ReplyWriter::new(self.answers);
        match row.map(Header::decode) {
            Some(Ok((header, value))) if header.is_alive(self.now_ms) && header.stamp.ns > flush_ns => {
                reply.bulk(value)
            }
            Some(Ok(_)) | None => reply.null(),
            Some(Err(error)) => return Err(self.corrupt(&error.to_string())),
        }
        Ok(())
    }

    /// The stamp of a key's row, dead or alive (zero if there is no row at all), and whether it is alive.
    pub fn raw_stamp(&mut self, key: &[u8]) -> Result<(Stamp, bool), Failure> {
        let cell = self.load(key)?;
        let flush_ns = self.flush_ns();
        let now_ms = self.now_ms;
        let Some((header, _)) = self.decode(cell)? else { return Ok((Stamp::default(), false)) };
        Ok((header.stamp, header.is_alive(now_ms) && header.stamp.ns > flush_ns))
    }

    /// Writes a string under a new stamp; a plain write always wins.
    pub fn put_string(&mut self, key: &[u8], put: Put<'_>) -> Result<(), Failure> {
        let header = Header {
            kind: RowKind::String,
            stamp: Stamp::default(),
            expires_at_ms: put.expires_at_ms,
            changed_in_place: put.changed_in_place,
        };
        self.write(key, header, put.value)
    }

    /// Writes a tombstone.
    pub fn delete(&mut self, key: &[u8]) -> Result<(), Failure> {
        let header =
            Header { kind: RowKind::Tombstone, stamp: Stamp::default(), expires_at_ms: 0, changed_in_place: false };
        self.write(key, header, &[])
    }

    /// Kills every row of the shard by one logged stamp. Only for commands that `command::takes_all_keys` names: all stripes are
    /// held then.
    pub fn flush(&mut self) -> Result<(), Failure> {
        let stamp = self.next_stamp()?;
        self.rows.flush = Some(stamp);
        Ok(())
    }

    /// The shard as a whole, for commands that walk it; sees the writes of this batch so far.
    pub fn shard(&self) -> ShardView<'_> {
        ShardView::new(self.shard, self.now_ms, self.flush_ns(), self.rows, self.batch)
    }

    fn flush_ns(&self) -> u64 {
        self.rows.flush.map_or_else(|| self.shard.flush_ns(), |stamp| stamp.ns)
    }

    fn find(&mut self, key: &[u8]) -> Result<CellIndex, Failure> {
        let cells = &self.rows.operation_cells[self.cells.clone()];
        let is =
            |place: usize| cells.get(place).is_some_and(|cell| self.rows.cells[*cell as usize].is(key, self.batch));
        let place = [self.hint, self.hint + 1].into_iter().find(|place| is(*place));
        // Keys come in order, some of them again: forward first, so that a long list is walked once.
        let place = place.or_else(|| (self.hint..cells.len()).chain(0..self.hint).find(|place| is(*place)));
        let Some(place) = place else {
            return Err(Failure::Error(CommandError::fixed(
                "ERR internal error: the command uses a key that it did not name",
            )));
        };
        self.hint = place;
        Ok(cells[place])
    }

    /// The cell of a key, its row fetched.
    fn load(&mut self, key: &[u8]) -> Result<CellIndex, Failure> {
        let cell = self.find(key)?;
        match &self.rows.cells[cell as usize].state {
            State::Absent | State::Cached(_) | State::Bytes { .. } => Ok(cell),
            State::NotInMemory => Err(Failure::Diverted),
            State::NotOwned(slot) => Err(not_owned(*slot, self.shard)),
            State::Broken(text) => Err(unreadable(self.shard, text)),
            State::Unfetched => {
                // A blind write of this batch came first and failed, so nobody fetched the row.
                self.rows.fetch_one(cell, &self.shard.database, self.tier);
                self.load(key)
            }
        }
    }

    /// The encoded row of a loaded cell.
    fn raw<'r>(rows: &'r Rows, stripes: &'r [StripeGuard<'_>], cell: CellIndex) -> Option<&'r [u8]> {
        let cell = &rows.cells[cell as usize];
        match cell.state {
            State::Cached(place) => Some(stripes[cell.guard as usize].cache.row(place)),
            State::Bytes { start, length } => Some(&rows.bytes[start..start + length]),
            State::Absent | State::Unfetched | State::NotInMemory | State::NotOwned(_) | State::Broken(_) => None,
        }
    }

    fn decode(&self, cell: CellIndex) -> Result<Option<(Header, &[u8])>, Failure> {
        match Self::raw(self.rows, self.stripes, cell).map(Header::decode) {
            None => Ok(None),
            Some(Ok(row)) => Ok(Some(row)),
            Some(Err(error)) => Err(self.corrupt(&error.to_string())),
        }
    }

    fn corrupt(&self, text: &str) -> Failure {
        unreadable(self.shard, text)
    }

    fn next_stamp(&mut self) -> Result<Stamp, Failure> {
        let database = &self.shard.database;
        let wanted = self.rows.cells.len() as u64;
        self.rows.stamps.next(&self.shard.stamps, self.now_ns, wanted, database, self.tier).map_err(|error| match error
        {
            EngineError::NotInMemory | EngineError::Stalled => Failure::Diverted,
            EngineError::Failed(text) => {
                Failure::Refused(Outcome::NotServing, format!("shard {}: {text}", self.shard.key))
            }
        })
    }

    fn write(&mut self, key: &[u8], mut header: Header, payload: &[u8]) -> Result<(), Failure> {
        let cell = self.find(key)?;
        if let State::NotOwned(slot) = self.rows.cells[cell as usize].state {
            return Err(not_owned(slot, self.shard));
        }
        header.stamp = self.next_stamp()?;
        self.rows.write(cell, &header, payload);
        Ok(())
    }
}

fn not_owned(slot: u16, shard: &Shard) -> Failure {
    Failure::Refused(Outcome::WrongEpoch, format!("slot {slot} is not in shard {}", shard.key))
}

fn unreadable(shard: &Shard, text: &str) -> Failure {
    Failure::Error(CommandError::from(format!("ERR shard {} cannot read a row: {text}", shard.key)))
}
