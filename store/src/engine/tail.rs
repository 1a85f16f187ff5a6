//! The end of a shard's log in memory, for the copies that follow it, and the turn in which its batches are written.
//!
//! A shard with one copy has none of it: its batches are written as they come, and RocksDB orders them.

use super::log_batch::LogBatch;
use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::sync::watch;

/// What is kept for followers that are a little behind; those further behind read the log's files.
const TAIL_BYTES_MAX: usize = 16 << 20;

/// One batch of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Logged {
    pub first: u64,
    pub last: u64,
    /// As RocksDB writes it, with the number of its first entry in its head.
    pub data: Bytes,
}

/// The newest batches, without a gap between them.
#[derive(Default)]
pub struct Ring {
    batches: VecDeque<Logged>,
    bytes: usize,
}

/// What stands behind a place in the log.
#[derive(Debug, PartialEq, Eq)]
pub enum Behind {
    /// Batches in order, the first of them right behind the place.
    Batches(Vec<Logged>),
    Nothing,
    /// It is not in memory.
    Older,
}

impl Ring {
    pub fn push(&mut self, logged: Logged) {
        if self.batches.back().is_some_and(|newest| newest.last + 1 != logged.first) {
            self.clear();
        }
        self.bytes += logged.data.len();
        self.batches.push_back(logged);
        while self.bytes > TAIL_BYTES_MAX {
            let Some(oldest) = self.batches.pop_front() else { break };
            self.bytes -= oldest.data.len();
        }
    }

    pub fn clear(&mut self) {
        self.batches.clear();
        self.bytes = 0;
    }

    /// The batches behind sequence number `after` of a log that ends with `latest`, up to about `bytes_max` bytes and at least one.
    pub fn behind(&self, after: u64, latest: u64, bytes_max: usize) -> Behind {
        if after >= latest {
            return Behind::Nothing;
        }
        let start = self.batches.partition_point(|batch| batch.first <= after);
        if self.batches.get(start).is_none_or(|batch| batch.first != after + 1) {
            return Behind::Older;
        }
        let mut bytes = 0;
        let within = |batch: &&Logged| {
            let fits = bytes == 0 || bytes + batch.data.len() <= bytes_max;
            bytes += batch.data.len();
            fits
        };
        Behind::Batches(self.batches.range(start..).take_while(within).cloned().collect())
    }

    pub fn batches(&self) -> impl Iterator<Item = &Logged> {
        self.batches.iter()
    }
}

/// The turn and what is written in it.
pub struct Tail {
    is_on: AtomicBool,
    pub ring: Mutex<Ring>,
    latest: watch::Sender<u64>,
    rows_up_to: AtomicU64,
}

impl Default for Tail {
    fn default() -> Self {
        Self {
            is_on: AtomicBool::new(false),
            ring: Mutex::default(),
            latest: watch::Sender::new(0),
            rows_up_to: AtomicU64::new(0),
        }
    }
}

impl Tail {
    pub fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Acquire)
    }

    /// From now on batches are written one after the other and kept for followers. No write may be under way.
    pub fn start(&self, latest: u64, rows_up_to: u64) {
        let mut ring = self.ring.lock();
        ring.clear();
        self.rows_up_to.store(rows_up_to, Ordering::Release);
        self.latest.send_replace(latest);
        self.is_on.store(true, Ordering::Release);
    }

    pub fn stop(&self) {
        let mut ring = self.ring.lock();
        self.is_on.store(false, Ordering::Release);
        ring.clear();
    }

    /// A batch is in the log; `ring` is held by its writer.
    pub fn wrote(&self, ring: &mut Ring, logged: Logged, has_rows: bool) {
        let last = logged.last;
        ring.push(logged);
        if has_rows {
            self.rows_up_to.fetch_max(last, Ordering::AcqRel);
        }
        self.latest.send_replace(last);
    }

    /// The number of the last entry that clients can see, as long as the tail is on.
    pub fn rows_up_to(&self) -> u64 {
        self.rows_up_to.load(Ordering::Acquire)
    }

    /// The number of the last entry, for whoever waits for the next.
    pub fn latest(&self) -> watch::Receiver<u64> {
        self.latest.subscribe()
    }
}

impl Logged {
    /// A batch that RocksDB has just given the numbers from `first` on.
    pub fn new(first: u64, last: u64, mut data: Vec<u8>) -> Self {
        if let Some(head) = data.first_chunk_mut::<8>() {
            *head = first.to_le_bytes();
        }
        Self { first, last, data: data.into() }
    }

    /// A batch as it lies in the log or comes from a leader; `None` if it has no entries or is none.
    pub fn read(data: Bytes) -> Option<Self> {
        let batch = LogBatch::parse(&data)?;
        let (first, count) = (batch.first, u64::from(batch.count));
        (count > 0).then(|| Self { first, last: first + count - 1, data })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logged(first: u64, last: u64, bytes: usize) -> Logged {
        Logged::new(first, last, vec![0; bytes])
    }

    #[test]
    fn what_is_behind_a_place_comes_without_a_gap_or_not_at_all() {
        let mut ring = Ring::default();
        assert_eq!(ring.behind(4, 4, 100), Behind::Nothing);
        assert_eq!(ring.behind(3, 4, 100), Behind::Older);
        ring.push(logged(5, 7, 20));
        ring.push(logged(8, 8, 20));
        ring.push(logged(9, 12, 20));
        let Behind::Batches(batches) = ring.behind(4, 12, 40) else { panic!() };
        assert_eq!(batches.iter().map(|batch| batch.last).collect::<Vec<_>>(), [7, 8]);
        assert_eq!(batches[0].data[..8], 5u64.to_le_bytes());
        // One batch at least, however large it is.
        assert_eq!(ring.behind(8, 12, 1), Behind::Batches(vec![logged(9, 12, 20)]));
        assert_eq!(ring.behind(5, 12, 40), Behind::Older, "in the middle of a batch");
        assert_eq!(ring.behind(12, 12, 40), Behind::Nothing);
        // Something that nobody saw was written in between.
        ring.push(logged(14, 14, 20));
        assert_eq!(ring.behind(12, 14, 40), Behind::Older);
        assert!(matches!(ring.behind(13, 14, 40), Behind::Batches(_)));
    }

    #[test]
    fn the_oldest_leave_when_there_is_no_room() {
        let mut ring = Ring::default();
        for number in 1..=40 {
            ring.push(logged(number, number, 1 << 20));
        }
        assert!(ring.bytes <= TAIL_BYTES_MAX);
        assert_eq!(ring.behind(3, 40, 1), Behind::Older);
        assert!(matches!(ring.behind(30, 40, 1), Behind::Batches(_)));
        ring.push(logged(41, 41, TAIL_BYTES_MAX + 1));
        assert_eq!(ring.behind(40, 41, 1), Behind::Older);
    }
}
