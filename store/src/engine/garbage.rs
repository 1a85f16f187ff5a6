//! What compaction does with dead rows: an expired row becomes a tombstone, a tombstone that nobody needs and a flushed row leave.
//!
//! A tombstone keeps older rows of its key from coming back, from a client that gives an old event time or from a copy of the shard
//! that was away. It may go when it was *written* longer than the grace ago and every copy of the shard has applied it. What goes
//! leaves its event time behind: [`Garbage::dropped_ns`] is on disk before a tombstone at or below it leaves, whatever crashes.

use super::changed_value::ChangedValue;
use rocksdb::CompactionDecision;
use rocksdb::compaction_filter::CompactionFilter;
use rocksdb::compaction_filter_factory::{CompactionFilterContext, CompactionFilterFactory};
use std::ffi::CStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use vasto_proto::row::{Header, RowKind};

/// The rules of one shard, which change while it is open.
#[derive(Debug)]
pub struct Garbage {
    /// The shard's format is known to be ours: until then every row stays as it is.
    is_armed: AtomicBool,
    grace_ns: u64,
    replicated_ns: AtomicU64,
    flush_ns: AtomicU64,
    dropped_ns: AtomicU64,
    /// The largest event time of a tombstone that stayed only because it is above `dropped_ns`.
    wanted_ns: AtomicU64,
    rows_expired: AtomicU64,
    tombstones_dropped: AtomicU64,
}

/// What the rules start from.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    pub grace: Duration,
    /// See [`Garbage::set_replicated_ns`].
    pub replicated_ns: u64,
}

/// The shard has one copy: whatever is written is applied by all.
pub const ONLY_COPY: u64 = u64::MAX;
/// Nothing is known of the other copies.
pub const UNKNOWN_COPIES: u64 = 0;

/// What becomes of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Keep,
    Drop,
    /// It has expired: a tombstone takes its place.
    Bury,
}

impl Garbage {
    /// Everything stays until [`Garbage::arm`].
    pub fn new(rules: Rules) -> Self {
        Self {
            is_armed: AtomicBool::new(false),
            grace_ns: u64::try_from(rules.grace.as_nanos()).unwrap_or(u64::MAX),
            replicated_ns: AtomicU64::new(rules.replicated_ns),
            flush_ns: AtomicU64::new(0),
            dropped_ns: AtomicU64::new(0),
            wanted_ns: AtomicU64::new(0),
            rows_expired: AtomicU64::new(0),
            tombstones_dropped: AtomicU64::new(0),
        }
    }

    /// The rows are known to be of a format that these rules understand.
    pub fn arm(&self) {
        self.is_armed.store(true, Ordering::Release);
    }

    /// The wall time up to which everything logged by this shard is applied by every copy of it: [`ONLY_COPY`] with one copy. With
    /// more it is [`UNKNOWN_COPIES`] until whoever follows the copies' positions reports better; then no tombstone leaves.
    pub fn set_replicated_ns(&self, ns: u64) {
        self.replicated_ns.store(ns, Ordering::Release);
    }

    /// Rows with an event time up to this are dead.
    pub fn flush_ns(&self) -> u64 {
        self.flush_ns.load(Ordering::Acquire)
    }

    /// A flush is in the log.
    pub fn flushed(&self, ns: u64) {
        self.flush_ns.fetch_max(ns, Ordering::AcqRel);
    }

    /// Tombstones with an event time up to this may have been dropped: of a key without any row, nothing older is known.
    pub fn dropped_ns(&self) -> u64 {
        self.dropped_ns.load(Ordering::Acquire)
    }

    /// The largest event time of the tombstones that may go once [`Garbage::dropped_ns`] is that large; `None` if it is.
    pub fn wanted_ns(&self) -> Option<u64> {
        let wanted_ns = self.wanted_ns.load(Ordering::Acquire);
        (wanted_ns > self.dropped_ns()).then_some(wanted_ns)
    }

    /// The disk remembers that tombstones up to this event time may be gone.
    pub fn may_drop_up_to(&self, ns: u64) {
        self.dropped_ns.fetch_max(ns, Ordering::AcqRel);
    }

    /// Everything written before this is past its grace.
    pub fn grace_ends_ns(&self, now_ns: u64) -> u64 {
        now_ns.saturating_sub(self.grace_ns)
    }

    /// Expired rows that compactions have met since the shard was opened.
    pub fn rows_expired(&self) -> u64 {
        self.rows_expired.load(Ordering::Relaxed)
    }

    /// Tombstones that compactions have dropped since the shard was opened.
    pub fn tombstones_dropped(&self) -> u64 {
        self.tombstones_dropped.load(Ordering::Relaxed)
    }

    fn judge(&self, header: &Header, now_ns: u64) -> Fate {
        if !self.is_armed.load(Ordering::Acquire) {
            return Fate::Keep;
        }
        if header.stamp.ns <= self.flush_ns() {
            return Fate::Drop;
        }
        if header.is_alive(now_ns / 1_000_000) {
            return Fate::Keep;
        }
        let stays = match header.kind {
            RowKind::Tombstone => Fate::Keep,
            RowKind::String => {
                self.rows_expired.fetch_add(1, Ordering::Relaxed);
                Fate::Bury
            }
        };
        let written_ns = header.written_ns();
        if written_ns >= self.grace_ends_ns(now_ns) || written_ns > self.replicated_ns.load(Ordering::Acquire) {
            return stays;
        }
        if header.stamp.ns > self.dropped_ns() {
            self.wanted_ns.fetch_max(header.stamp.ns, Ordering::AcqRel);
            return stays;
        }
        self.tombstones_dropped.fetch_add(1, Ordering::Relaxed);
        Fate::Drop
    }
}

/// Makes one filter for each compaction.
pub struct Factory(pub Arc<Garbage>);

impl CompactionFilterFactory for Factory {
    type Filter = Filter;

    fn create(&mut self, _context: CompactionFilterContext) -> Filter {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        Filter { garbage: Arc::clone(&self.0), now_ns, buried: ChangedValue::default() }
    }

    fn name(&self) -> &CStr {
        c"vasto"
    }
}

/// The filter of one compaction: its clock stands still.
pub struct Filter {
    garbage: Arc<Garbage>,
    now_ns: u64,
    buried: ChangedValue,
}

impl CompactionFilter for Filter {
    fn filter(&mut self, _level: u32, _key: &[u8], value: &[u8]) -> CompactionDecision {
        // What cannot be read stays for a person to look at.
        let Ok((header, _)) = Header::decode(value) else { return CompactionDecision::Keep };
        match self.garbage.judge(&header, self.now_ns) {
            Fate::Keep => CompactionDecision::Keep,
            Fate::Drop => CompactionDecision::Remove,
            Fate::Bury => self.buried.decision(|tombstone| header.buried().encode_into(tombstone)),
        }
    }

    fn name(&self) -> &CStr {
        c"vasto"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vasto_proto::row::Stamp;

    const SECOND: u64 = 1_000_000_000;
    const NOW: u64 = 100 * SECOND;

    fn row(kind: RowKind, ns: u64, expires_at_ms: u64) -> Header {
        let stamp = Stamp { ns, origin: 1, sequence: 1 };
        Header { kind, stamp, expires_at_ms, changed_in_place: false, written_at_ns: 0 }
    }

    fn garbage(replicated_ns: u64) -> Garbage {
        let garbage = Garbage::new(Rules { grace: Duration::from_secs(10), replicated_ns });
        garbage.arm();
        garbage
    }

    #[test]
    fn expired_rows_are_buried_and_flushed_ones_dropped() {
        let garbage = garbage(ONLY_COPY);
        for (expires_at_ms, fate) in [
            (0, Fate::Keep),
            // Alive in its last millisecond.
            (100_000, Fate::Keep),
            (99_999, Fate::Bury),
        ] {
            assert_eq!(garbage.judge(&row(RowKind::String, 95 * SECOND, expires_at_ms), NOW), fate);
        }
        assert_eq!((garbage.rows_expired(), garbage.tombstones_dropped()), (1, 0));
        garbage.flushed(50 * SECOND);
        assert_eq!(garbage.judge(&row(RowKind::String, 50 * SECOND, 0), NOW), Fate::Drop);
        assert_eq!(
            garbage.judge(&row(RowKind::String, 50 * SECOND + 1, 0), NOW),
            Fate::Keep,
            "written after the flush"
        );
    }

    #[test]
    fn a_tombstone_leaves_when_it_is_old_and_everywhere_and_its_event_time_is_noted() {
        let garbage = garbage(UNKNOWN_COPIES);
        let old = row(RowKind::Tombstone, 89 * SECOND, 0);
        assert_eq!(garbage.judge(&old, NOW), Fate::Keep, "the copies may not have it");
        assert_eq!(garbage.wanted_ns(), None);
        garbage.set_replicated_ns(89 * SECOND);
        assert_eq!(garbage.judge(&old, NOW), Fate::Keep, "nobody would know of it after a crash");
        assert_eq!(garbage.wanted_ns(), Some(89 * SECOND));
        garbage.may_drop_up_to(89 * SECOND);
        assert_eq!((garbage.wanted_ns(), garbage.dropped_ns()), (None, 89 * SECOND));
        assert_eq!(garbage.judge(&old, NOW), Fate::Drop);
        assert_eq!(
            garbage.judge(&row(RowKind::String, 89 * SECOND, 95_000), NOW),
            Fate::Drop,
            "as good as a tombstone"
        );
        assert_eq!(garbage.judge(&row(RowKind::Tombstone, 90 * SECOND, 0), NOW), Fate::Keep, "within the grace");
        assert_eq!((garbage.rows_expired(), garbage.tombstones_dropped()), (1, 2));
    }

    #[test]
    fn the_grace_counts_from_the_writing_and_not_from_a_given_event_time() {
        let garbage = garbage(ONLY_COPY);
        garbage.may_drop_up_to(50 * SECOND);
        let given = |written_at_ns| Header { written_at_ns, ..row(RowKind::Tombstone, SECOND, 0) };
        assert_eq!(garbage.judge(&given(95 * SECOND), NOW), Fate::Keep);
        assert_eq!(garbage.judge(&given(89 * SECOND), NOW), Fate::Drop);
    }

    #[test]
    fn nothing_is_touched_before_the_format_is_known() {
        let garbage = Garbage::new(Rules { grace: Duration::ZERO, replicated_ns: ONLY_COPY });
        garbage.flushed(50 * SECOND);
        garbage.may_drop_up_to(50 * SECOND);
        for kind in [RowKind::Tombstone, RowKind::String] {
            assert_eq!(garbage.judge(&row(kind, SECOND, 1), NOW), Fate::Keep);
        }
    }
}
