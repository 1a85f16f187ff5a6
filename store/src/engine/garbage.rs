//! What compaction drops: rows that a flush killed, tombstones past their grace, expired rows.
//!
//! Design asks that an expired row becomes a tombstone of the same stamp first. The binding takes new values only as
//! `&'static [u8]`, which would leak one allocation a row. So an expired row is dropped as a whole: at once where no other copy
//! of the shard exists that could bring an older row back, else when its expiry is as long ago as a tombstone's grace.

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
    grace_ns: u64,
    /// No other copy of the shard exists.
    is_only_copy: AtomicBool,
    flush_ns: AtomicU64,
    dropped_ns: AtomicU64,
}

/// What the rules start from.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    pub grace: Duration,
    pub is_only_copy: bool,
}

impl Garbage {
    pub fn new(rules: Rules) -> Self {
        Self {
            grace_ns: u64::try_from(rules.grace.as_nanos()).unwrap_or(u64::MAX),
            is_only_copy: AtomicBool::new(rules.is_only_copy),
            flush_ns: AtomicU64::new(0),
            dropped_ns: AtomicU64::new(0),
        }
    }

    pub fn set_is_only_copy(&self, is_only_copy: bool) {
        self.is_only_copy.store(is_only_copy, Ordering::Release);
    }

    /// Rows with an event time up to this are dead.
    pub fn flush_ns(&self) -> u64 {
        self.flush_ns.load(Ordering::Acquire)
    }

    /// A flush is in the log.
    pub fn flushed(&self, ns: u64) {
        self.flush_ns.fetch_max(ns, Ordering::AcqRel);
    }

    /// The largest event time of a dropped tombstone.
    pub fn dropped_ns(&self) -> u64 {
        self.dropped_ns.load(Ordering::Acquire)
    }

    pub fn dropped(&self, ns: u64) {
        self.dropped_ns.fetch_max(ns, Ordering::AcqRel);
    }

    /// Everything with a stamp before this may have been dropped by now.
    pub fn grace_ends_ns(&self, now_ns: u64) -> u64 {
        now_ns.saturating_sub(self.grace_ns)
    }

    fn may_drop(&self, header: &Header, now_ns: u64) -> bool {
        let grace_ends_ns = self.grace_ends_ns(now_ns);
        if header.stamp.ns <= self.flush_ns() {
            return true;
        }
        match header.kind {
            RowKind::Tombstone => {
                let old = header.stamp.ns < grace_ends_ns;
                if old {
                    self.dropped(header.stamp.ns);
                }
                old
            }
            RowKind::String => {
                if header.is_alive(now_ns / 1_000_000) {
                    return false;
                }
                let died_ns = header.expires_at_ms.saturating_mul(1_000_000).max(header.stamp.ns);
                if self.is_only_copy.load(Ordering::Acquire) {
                    return true;
                }
                if died_ns < grace_ends_ns {
                    self.dropped(header.stamp.ns);
                    return true;
                }
                false
            }
        }
    }
}

/// Makes one filter for each compaction.
pub struct Factory(pub Arc<Garbage>);

impl CompactionFilterFactory for Factory {
    type Filter = Filter;

    fn create(&mut self, _context: CompactionFilterContext) -> Filter {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Filter { garbage: Arc::clone(&self.0), now_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX) }
    }

    fn name(&self) -> &CStr {
        c"vasto"
    }
}

/// The filter of one compaction: its clock stands still.
pub struct Filter {
    garbage: Arc<Garbage>,
    now_ns: u64,
}

impl CompactionFilter for Filter {
    fn filter(&mut self, _level: u32, _key: &[u8], value: &[u8]) -> CompactionDecision {
        match Header::decode(value) {
            Ok((header, _)) if self.garbage.may_drop(&header, self.now_ns) => CompactionDecision::Remove,
            // What cannot be read stays for a person to look at.
            Ok(_) | Err(_) => CompactionDecision::Keep,
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

    #[test]
    fn only_what_nobody_can_need_is_dropped() {
        const SECOND: u64 = 1_000_000_000;
        let row = |kind, ns, expires_at_ms| Header {
            kind,
            stamp: Stamp { ns, origin: 1, sequence: 1 },
            expires_at_ms,
            changed_in_place: false,
        };
        let garbage = Garbage::new(Rules { grace: Duration::from_secs(10), is_only_copy: false });
        let now = 100 * SECOND;
        assert!(!garbage.may_drop(&row(RowKind::String, SECOND, 0), now), "alive");
        assert!(!garbage.may_drop(&row(RowKind::String, SECOND, 100_000), now), "alive in its last millisecond");
        assert!(!garbage.may_drop(&row(RowKind::Tombstone, 95 * SECOND, 0), now), "young tombstone");
        assert!(!garbage.may_drop(&row(RowKind::String, SECOND, 95_000), now), "expired a moment ago");
        assert_eq!(garbage.dropped_ns(), 0);
        assert!(garbage.may_drop(&row(RowKind::String, SECOND, 80_000), now), "expired long ago");
        assert!(garbage.may_drop(&row(RowKind::Tombstone, 89 * SECOND, 0), now), "old tombstone");
        assert_eq!(garbage.dropped_ns(), 89 * SECOND);
        garbage.set_is_only_copy(true);
        assert!(garbage.may_drop(&row(RowKind::String, SECOND, 99_999), now), "nobody could bring an older row back");
        garbage.flushed(50 * SECOND);
        assert!(garbage.may_drop(&row(RowKind::String, 50 * SECOND, 0), now), "flushed");
        assert!(!garbage.may_drop(&row(RowKind::String, 50 * SECOND + 1, 0), now), "written after the flush");
    }
}
