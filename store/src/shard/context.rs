//! What one command sees of its shard: rows through the overlay of its batch's own writes.

use super::Shard;
use super::executor::Core;
use super::ownership::Owned;
use super::rows::{CellIndex, Rows, State};
use super::stripes::StripeGuard;
use super::view::ShardView;
use crate::backup::{BackupError, Status};
use crate::config::Limits;
use crate::engine::{EngineError, Tier};
use crate::replication::comparison::{self, Comparison, Haste};
use bytes::Bytes;
use std::cmp::Ordering;
use std::ops::Range;
use std::sync::Arc;
use vasto_proto::batch::Outcome;
use vasto_proto::command::ReplyWriter;
use vasto_proto::error::{self, CommandError};
use vasto_proto::net::LARGE_VALUE_BYTES;
use vasto_proto::row::{Header, RowKind, Stamp, covered_by, precedence};

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

/// When a write happened, as its client says: checked, Unix nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventTime {
    pub ns: u64,
}

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Written,
    /// The very same write was here already.
    Repeated,
    /// What is stored is newer: nothing changed.
    Older,
}

impl Verdict {
    /// Whether the key is as the write wants it.
    pub fn holds(self) -> bool {
        match self {
            Self::Written | Self::Repeated => true,
            Self::Older => false,
        }
    }
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
    pub(super) core: &'a Core,
    pub(super) tier: Tier,
    pub(super) has_large_permit: bool,
    /// Of a command that covers slots: those that the shard owned when it began.
    pub(super) owned: Option<Arc<Owned>>,
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

    /// Unix time in nanoseconds, read once per batch.
    pub fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// Bytes that the store's row cache holds, as of the last second.
    pub fn row_cache_bytes(&self) -> u64 {
        self.core.counters.row_cache_bytes()
    }

    /// Refuses to make a value above the large-value threshold without a permit; before anything is written.
    pub fn admit_value(&self, bytes: usize) -> Result<(), Failure> {
        if bytes > LARGE_VALUE_BYTES && !self.has_large_permit {
            return Err(Failure::Refused(Outcome::NeedsLargePermit, String::new()));
        }
        Ok(())
    }

    pub fn limits(&self) -> &'a Limits {
        &self.core.limits
    }

    /// Begins a backup of the whole store, which goes on in the blocking lane.
    pub fn start_backup(&self, name: &str) -> Result<(), BackupError> {
        self.core.backups.begin(name)?;
        self.core.pool.schedule_backup(name.to_owned());
        Ok(())
    }

    /// Makes a backup of the whole store; blocks for long.
    pub fn make_backup(&self, name: &str) -> Result<(), BackupError> {
        self.core.backups.begin(name)?;
        self.core.backups.run(&self.core.shards.current(), name)
    }

    /// Compares the shard's copies; blocks for long.
    pub fn compare_copies(&self) -> Result<Comparison, String> {
        comparison::compare(self.core, self.shard, Haste::AtOnce)
    }

    pub fn backup_status(&self) -> Status {
        self.core.backups.status()
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

    /// The stamp of what a key was last seen as, dead or alive (zero if there is no row at all), and whether it is alive.
    pub fn seen_stamp(&mut self, key: &[u8]) -> Result<(Stamp, bool), Failure> {
        let cell = self.load(key)?;
        let flush_ns = self.flush_ns();
        let now_ms = self.now_ms;
        let Some((header, value)) = self.decode(cell)? else { return Ok((Stamp::default(), false)) };
        let alive = header.is_alive(now_ms) && header.stamp.ns > flush_ns;
        Ok((covered_by(&header, value).unwrap_or(header.stamp), alive))
    }

    /// Writes a string under a new stamp; a plain write always wins.
    pub fn put_string(&mut self, key: &[u8], put: Put<'_>) -> Result<(), Failure> {
        self.write(key, unstamped(&put), put.value)
    }

    /// Writes a string: with an event time only if it is newer than what is stored, dead or alive.
    pub fn put_string_at(&mut self, key: &[u8], put: Put<'_>, time: Option<EventTime>) -> Result<Verdict, Failure> {
        let Some(time) = time else {
            self.put_string(key, put)?;
            return Ok(Verdict::Written);
        };
        self.write_at(key, unstamped(&put), put.value, time)?.ok_or(Failure::Error(error::EVENT_TIME_TOO_OLD))
    }

    /// Writes a tombstone, over nothing too: what is older may still come, from a client that gives its event time or from a copy
    /// that was away, and must not survive this.
    pub fn delete(&mut self, key: &[u8]) -> Result<(), Failure> {
        let covered = self.covered(key)?;
        self.write(key, UNSTAMPED_TOMBSTONE, covered.as_ref().map_or(&[][..], |stamp| stamp))
    }

    /// What a tombstone must carry for those who watch the key, if it will delete nothing that is alive.
    fn covered(&mut self, key: &[u8]) -> Result<Option<[u8; Stamp::BYTES]>, Failure> {
        let (stamp, alive) = self.seen_stamp(key)?;
        Ok((!alive).then(|| stamp.to_bytes()))
    }

    /// Writes a tombstone: with an event time only if it is newer than what is stored, dead or alive.
    pub fn delete_at(&mut self, key: &[u8], time: Option<EventTime>) -> Result<Verdict, Failure> {
        let Some(time) = time else {
            self.delete(key)?;
            return Ok(Verdict::Written);
        };
        let covered = self.covered(key)?;
        let payload = covered.as_ref().map_or(&[][..], |stamp| stamp);
        // Below the deletions that are forgotten nothing can be written to a key without a row: this one holds as it is.
        Ok(self.write_at(key, UNSTAMPED_TOMBSTONE, payload, time)?.unwrap_or(Verdict::Repeated))
    }

    /// Kills every row of the shard by one logged stamp. Only for commands that `command::takes_all_keys` names: all stripes are
    /// held then.
    pub fn flush(&mut self) -> Result<(), Failure> {
        let stamp = self.next_stamp()?;
        self.rows.flush = Some(stamp);
        Ok(())
    }

    /// The number by which Redis clients know the keyspace, if its name is one.
    pub fn database_number(&self) -> Option<i64> {
        self.shard.database_number
    }

    /// The shard as a whole, for commands that walk it; sees the writes of this batch so far.
    pub fn shard(&self) -> ShardView<'_> {
        let owned = self.owned.clone().unwrap_or_else(|| self.shard.owned());
        ShardView::new(self.shard, self.now_ms, self.flush_ns(), self.rows, self.batch, owned)
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
        let drawn = self.rows.stamps.next(&self.shard.stamps, self.now_ns, wanted, database, self.tier);
        drawn.map_err(|error| no_stamp(self.shard, error))
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

    /// Writes a row with an event time that a client gave, if it wins over the one that is stored. `None`, and nothing is written: there
    /// is no row, and a tombstone above the event time may have been dropped.
    fn write_at(
        &mut self,
        key: &[u8],
        mut header: Header,
        payload: &[u8],
        time: EventTime,
    ) -> Result<Option<Verdict>, Failure> {
        let cell = self.load(key)?;
        if time.ns <= self.flush_ns() {
            return Ok(Some(Verdict::Older));
        }
        header.stamp = Stamp::given(time.ns, header.kind, header.expires_at_ms, payload);
        let stored = self.decode(cell)?;
        // What compaction made of this very write when it had expired.
        let is_buried = stored
            .is_some_and(|(stored, _)| stored == Header { written_at_ns: stored.written_at_ns, ..header.buried() });
        match stored.map(|(stored, value)| precedence((&header, payload), (&stored, value))) {
            Some(_) if is_buried => return Ok(Some(Verdict::Repeated)),
            // Whoever dropped a tombstone has raised this before.
            None if time.ns <= self.shard.database.garbage().dropped_ns() => return Ok(None),
            Some(Ordering::Less) => return Ok(Some(Verdict::Older)),
            Some(Ordering::Equal) => return Ok(Some(Verdict::Repeated)),
            Some(Ordering::Greater) | None => {}
        }
        let (stamps, database) = (&self.shard.stamps, &self.shard.database);
        // Before the row is visible: the next plain write must win over it, after a crash too.
        let observed = self.rows.stamps.observe(stamps, time.ns, database, self.tier);
        observed.map_err(|error| no_stamp(self.shard, error))?;
        header.written_at_ns = stamps.time_ns(self.now_ns);
        self.rows.write(cell, &header, payload);
        Ok(Some(Verdict::Written))
    }
}

const UNSTAMPED_TOMBSTONE: Header = Header {
    kind: RowKind::Tombstone,
    stamp: Stamp { ns: 0, origin: 0, sequence: 0 },
    expires_at_ms: 0,
    changed_in_place: false,
    written_at_ns: 0,
};

fn unstamped(put: &Put<'_>) -> Header {
    let (expires_at_ms, changed_in_place) = (put.expires_at_ms, put.changed_in_place);
    Header { kind: RowKind::String, stamp: Stamp::default(), expires_at_ms, changed_in_place, written_at_ns: 0 }
}

fn no_stamp(shard: &Shard, error: EngineError) -> Failure {
    match error {
        EngineError::NotInMemory | EngineError::Stalled => Failure::Diverted,
        EngineError::Full(_) | EngineError::Disk(_) | EngineError::Corrupt(_) | EngineError::Failed(_) => {
            shard.meet(&error);
            Failure::Refused(Outcome::NotServing, format!("shard {}: {error}", shard.key))
        }
    }
}

fn not_owned(slot: u16, shard: &Shard) -> Failure {
    Failure::Refused(Outcome::WrongEpoch, format!("slot {slot} is not in shard {}", shard.key))
}

fn unreadable(shard: &Shard, text: &str) -> Failure {
    shard.note_unreadable(text);
    Failure::Error(CommandError::from(format!("ERR shard {} cannot read a row: {text}", shard.key)))
}
